// Package wire is the syntax of SMTP and nothing else: replies, commands, line ends. It knows no time, no policy and no
// connection beyond an io.Reader or io.Writer.
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

// Bounds on what a relay may say. RFC 5321, 4.5.3.1.5 gives 512 octets for a reply line, and real relays exceed it; a
// challenge of AUTH may have 12,288 (RFC 4954, 4).
const (
	MaxReplyLine = 16 << 10 // octets of a line; a longer one is ErrTooLong
	MaxReply     = 64 << 10 // octets of a reply, all its lines together; a longer one is ErrTooLong
	MaxText      = 2 << 10  // octets of a reply's text that are kept
	MaxLongText  = 16 << 10 // the same, where the text is data: the reply to EHLO, and a challenge
)

// readBuffer is the size of a session's read buffer. Few relays ever say a line that does not fit.
const readBuffer = 4 << 10

// Errors of ReadReply, beside those of the io.Reader.
var (
	ErrMalformed = errors.New("malformed reply")
	ErrTooLong   = errors.New("reply too long")
)

// MalformedError is an ErrMalformed that has the line.
type MalformedError struct{ Line string }

func (e *MalformedError) Error() string { return "malformed reply: " + printable.Quote(e.Line, 80) }

// Unwrap returns ErrMalformed.
func (e *MalformedError) Unwrap() error { return ErrMalformed }

// Reply is a whole reply, multiline or not.
type Reply struct {
	Code     int    // 200 to 599
	Enhanced [3]int // zero if there is none
	Text     string // without code and enhanced code, lines joined by "\n"; no more than MaxText or MaxLongText of it
}

// String returns the reply on one line of printable characters, with the relay's words as a Go string literal, as in
// `550 5.1.1 "no such user"`. Words of more than a kilobyte are cut, and "..." follows the closing quote.
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

// Class is the first digit of the code.
func (r Reply) Class() int { return r.Code / 100 }

// ReplyReader reads replies.
type ReplyReader struct {
	br     *bufio.Reader
	text   []byte    // of the reply being read
	recent [4]string // texts that were read before: relays say the same thing over and over
	next   int
	yes    bool // a line of the last reply had a code of 2yz
}

// NewReplyReader returns a ReplyReader on r.
func NewReplyReader(r io.Reader) *ReplyReader {
	return &ReplyReader{br: bufio.NewReaderSize(r, readBuffer)}
}

// Buffered tells how many bytes were received and not yet read as replies.
func (r *ReplyReader) Buffered() int { return r.br.Buffered() }

// Peek returns the code of a further reply that was received already; 0 if there is none. Empty lines do not count.
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

// Await waits until something is received, or reading fails; the next read tells which.
func (r *ReplyReader) Await() { r.br.Peek(1) }

// HadYes reports whether a line of the reply that was read last had a code of 2yz, whatever the code of the last line.
func (r *ReplyReader) HadYes() bool { return r.yes }

// ReadReply reads one reply and keeps MaxText octets of its text. At a clean end of input the error is io.EOF, within a reply
// io.ErrUnexpectedEOF.
//
// It takes what relays send against RFC 5321, 4.2.1 where that cannot be read in two ways: empty lines before a reply, lines
// without a code within a multiline reply, and lines of one reply that differ in their codes, of which the last counts.
func (r *ReplyReader) ReadReply() (Reply, error) { return r.read(MaxText) }

// ReadLong is ReadReply for a reply that may carry data. It keeps MaxLongText octets of the text, but of a refusal (4xx, 5xx)
// MaxText, since its text ends in an error.
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
				err = &MalformedError{Line: string(line)} // however it would go on
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

// takeCode takes in the code of a further line, and the enhanced code if it has one. It returns the rest of the line's text.
func (r *Reply) takeCode(code int, text []byte) []byte {
	if code/100 != r.Class() {
		r.Enhanced = [3]int{} // it was that of another class
	}
	r.Code = code
	enhanced, rest, ok := cutEnhanced(code, text)
	if ok && r.Enhanced == [3]int{} {
		r.Enhanced = enhanced
	}
	return rest
}

// trimLineEnd cuts LF or CRLF off.
func trimLineEnd(line []byte) []byte {
	return bytes.TrimSuffix(bytes.TrimSuffix(line, []byte{'\n'}), []byte{'\r'})
}

// isBlank reports whether line, without its end, shows nothing.
func isBlank(line []byte) bool { return len(bytes.Trim(line, " \t\r")) == 0 }

// keep appends a line to the text, of which most octets are kept. Data ends at a line, so that no half of a word or number
// is taken for a whole one; words for a reader end at a character.
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

// longLine reads on where a line has filled the buffer.
func (r *ReplyReader) longLine(part []byte) (line []byte, err error) {
	for err = bufio.ErrBufferFull; err == bufio.ErrBufferFull; {
		if line = append(line, part...); len(line) >= MaxReplyLine {
			return line, err
		}
		part, err = r.br.ReadSlice('\n')
	}
	return append(line, part...), err
}

// intern returns b as a string, without allocating where the same text came a moment ago.
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

// splitLine takes a reply line apart: three digits, then SP for the last line, "-" for one of several, or nothing
// (RFC 5321, 4.2 and 4.2.1).
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

// cutEnhanced cuts an enhanced status code (RFC 3463) whose class agrees with code off the front of text.
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
