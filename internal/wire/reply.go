// Package wire implements the syntax of SMTP: replies, commands, line ends. It has no timeouts and no policy, and uses a
// connection only as an io.Reader or io.Writer.
package wire

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"

	"github.com/smtprelay/smtprelay/internal/printable"
)

// Bounds on replies. RFC 5321, 4.5.3.1.5 allows 512 octets for a reply line, but real relays exceed that; an AUTH challenge may
// have 12,288 octets (RFC 4954, 4).
const (
	MaxReplyLine = 16 << 10 // octets of a line; a longer line is ErrTooLong
	MaxReply     = 64 << 10 // octets of a reply, all lines together; a longer reply is ErrTooLong
	MaxText      = 2 << 10  // octets of a reply's text that ReadReply keeps
	MaxLongText  = 16 << 10 // octets that ReadLong keeps, for the reply to EHLO and for challenges
)

// readBuffer is the size of a connection's read buffer. Few relays ever send a line that does not fit.
const readBuffer = 4 << 10

// Errors of ReadReply, in addition to those of the io.Reader.
var (
	ErrMalformed = errors.New("malformed reply")
	ErrTooLong   = errors.New("reply too long")
)

// MalformedError is an ErrMalformed with the line.
type MalformedError struct{ Line string }

func (e *MalformedError) Error() string { return "malformed reply: " + printable.Quote(e.Line, 80) }

// Unwrap returns ErrMalformed.
func (e *MalformedError) Unwrap() error { return ErrMalformed }

// Reply is a complete reply, multiline or not.
type Reply struct {
	Code     int    // 200 to 599
	Enhanced [3]int // zero if there is none
	Text     string // without code and enhanced code, lines joined by "\n"; no more than MaxText or MaxLongText of it
}

// String returns the reply on one line of printable characters, with the relay's text as a Go string literal, as in
// `550 5.1.1 "no such user"`. Text of more than a kilobyte is cut, and "..." follows the closing quote.
func (r Reply) String() string {
	text := strconv.Itoa(r.Code)
	if e := r.Enhanced; e != [3]int{} {
		text += fmt.Sprintf(" %d.%d.%d", e[0], e[1], e[2])
	}
	if r.Text != "" {
		text += " " + printable.Quote(r.Text, printable.MostWords)
	}
	return text
}

// Class returns the first digit of the code.
func (r Reply) Class() int { return r.Code / 100 }

// ReplyReader reads replies.
type ReplyReader struct {
	br     *bufio.Reader
	text   []byte    // text of the reply being read
	recent [4]string // recent texts, for intern: relays repeat the same texts
	next   int
	yes    bool // a line of the last reply had a 2xx code
}

// NewReplyReader returns a ReplyReader on r.
func NewReplyReader(r io.Reader) *ReplyReader {
	return &ReplyReader{br: bufio.NewReaderSize(r, readBuffer)}
}

// Buffered returns the number of bytes received but not yet read as replies.
func (r *ReplyReader) Buffered() int { return r.br.Buffered() }

// Peek returns the code of the next reply if it was already received; 0 otherwise. Empty lines do not count.
func (r *ReplyReader) Peek() int {
	b, _ := r.br.Peek(r.br.Buffered())
	for line := range bytes.Lines(b) {
		if line = trimLineEnd(line); !isBlank(line) {
			code, _, _, _ := splitLine(line)
			return code
		}
	}
	return 0
}

// Await waits until data arrives or reading fails; the next read returns the error.
func (r *ReplyReader) Await() { r.br.Peek(1) }

// HadYes reports whether any line of the last reply had a 2xx code.
func (r *ReplyReader) HadYes() bool { return r.yes }

// ReadReply reads one reply and keeps MaxText octets of its text. The error is io.EOF if the input ends before a reply, and
// io.ErrUnexpectedEOF if it ends within a reply.
//
// ReadReply accepts unambiguous violations of RFC 5321, 4.2.1: empty lines before a reply, lines without a code within a
// multiline reply, and lines of one reply with different codes, of which the last counts.
func (r *ReplyReader) ReadReply() (Reply, error) { return r.read(MaxText) }

// ReadLong is like ReadReply, for a reply that may carry data. It keeps MaxLongText octets of the text, but only MaxText of a
// refusal (4xx, 5xx), whose text becomes part of an error.
func (r *ReplyReader) ReadLong() (Reply, error) { return r.read(MaxLongText) }

func (r *ReplyReader) read(keep int) (Reply, error) {
	var reply Reply
	r.text, r.yes = r.text[:0], false
	total := 0
	for first := true; ; {
		line, err := r.br.ReadSlice('\n')
		if err == bufio.ErrBufferFull {
			line, err = r.longLine(line)
		}
		if err != nil {
			switch {
			case errors.Is(err, bufio.ErrBufferFull):
				err = fmt.Errorf("%w: a line of more than %d octets", ErrTooLong, MaxReplyLine)
			case err == io.EOF && first && !isBlank(line) && (line[0] < '2' || line[0] > '5'):
				err = &MalformedError{Line: string(line)} // malformed, whatever follows
			case err == io.EOF && (len(line) > 0 || !first):
				err = io.ErrUnexpectedEOF
			}
			return Reply{}, err
		}
		if total += len(line); total > MaxReply {
			return Reply{}, fmt.Errorf("%w: more than %d octets", ErrTooLong, MaxReply)
		}
		line = trimLineEnd(line)
		code, last, text, ok := splitLine(line)
		switch {
		case ok:
			text = reply.takeCode(code, text)
			r.yes = r.yes || code < 300
		case !first:
			text = line
		case isBlank(line):
			continue
		default:
			return Reply{}, &MalformedError{Line: string(line)}
		}
		if reply.Code >= 400 {
			keep = MaxText
		}
		r.keep(text, first, keep)
		if last {
			reply.Text = r.intern(r.text)
			return reply, nil
		}
		first = false
	}
}

// takeCode applies the code of a continuation line, and its enhanced code if it has one, to the reply. It returns the rest of
// the text.
func (r *Reply) takeCode(code int, text []byte) []byte {
	if code/100 != r.Class() {
		r.Enhanced = [3]int{} // the enhanced code was of another class
	}
	r.Code = code
	enhanced, rest, ok := cutEnhanced(code, text)
	if ok && r.Enhanced == [3]int{} {
		r.Enhanced = enhanced
	}
	return rest
}

// trimLineEnd returns line without LF or CRLF at the end.
func trimLineEnd(line []byte) []byte {
	return bytes.TrimSuffix(bytes.TrimSuffix(line, []byte{'\n'}), []byte{'\r'})
}

// isBlank reports whether line, without its line end, is white space only.
func isBlank(line []byte) bool { return len(bytes.Trim(line, " \t\r")) == 0 }

// keep appends a line to the text, up to most octets. Data is cut at a line end, so that no part of a word or number is taken
// for the whole. Text for people is cut at a character.
func (r *ReplyReader) keep(line []byte, first bool, most int) {
	if !utf8.Valid(line) {
		line = bytes.ToValidUTF8(line, []byte("\uFFFD"))
	}
	room := most - len(r.text)
	if !first {
		room--
	}
	if len(line) > room && most == MaxLongText || room < 0 {
		return
	}
	if !first {
		r.text = append(r.text, '\n')
	}
	if len(line) > room {
		for room > 0 && !utf8.RuneStart(line[room]) {
			room--
		}
		line = line[:room]
	}
	r.text = append(r.text, line...)
}

// longLine reads the rest of a line that has filled the buffer.
func (r *ReplyReader) longLine(part []byte) (line []byte, err error) {
	for err = bufio.ErrBufferFull; err == bufio.ErrBufferFull; {
		if line = append(line, part...); len(line) >= MaxReplyLine {
			return line, err
		}
		part, err = r.br.ReadSlice('\n')
	}
	return append(line, part...), err
}

// intern returns b as a string, without an allocation if it equals a recent text.
func (r *ReplyReader) intern(b []byte) string {
	for _, s := range r.recent {
		if s == string(b) {
			return s
		}
	}
	s := string(b)
	r.recent[r.next] = s
	r.next = (r.next + 1) % len(r.recent)
	return s
}

// splitLine splits a reply line: three digits, then a space in the last line, "-" in any other line, or nothing (RFC 5321, 4.2
// and 4.2.1).
func splitLine(line []byte) (code int, last bool, text []byte, ok bool) {
	if len(line) < 3 || line[0] < '2' || line[0] > '5' || !isDigit(line[1]) || !isDigit(line[2]) {
		return 0, false, nil, false
	}
	code = int(line[0]-'0')*100 + int(line[1]-'0')*10 + int(line[2]-'0')
	switch {
	case len(line) == 3:
		return code, true, nil, true
	case line[3] == ' ':
		return code, true, line[4:], true
	case line[3] == '-':
		return code, false, line[4:], true
	}
	return 0, false, nil, false
}

// cutEnhanced removes an enhanced status code (RFC 3463) from the front of text, if its class equals that of code.
func cutEnhanced(code int, text []byte) (enhanced [3]int, rest []byte, ok bool) {
	if c := code / 100; c == 3 || len(text) < 5 || int(text[0]-'0') != c || text[1] != '.' {
		return enhanced, text, false
	}
	rest = text
	for i := range enhanced {
		n, digits := 0, 0
		for len(rest) > 0 && isDigit(rest[0]) && digits < 3 {
			n, rest, digits = n*10+int(rest[0]-'0'), rest[1:], digits+1
		}
		if digits == 0 {
			return [3]int{}, text, false
		}
		enhanced[i] = n
		if i < 2 {
			if len(rest) == 0 || rest[0] != '.' {
				return [3]int{}, text, false
			}
			rest = rest[1:]
		}
	}
	if len(rest) > 0 && rest[0] != ' ' {
		return [3]int{}, text, false
	}
	return enhanced, bytes.TrimPrefix(rest, []byte{' '}), true
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
