package sockets

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
)

// A strict relay on plain sockets: it parses SMTP with DATA and CHUNKING itself, complains about clients that break the rules,
// and has the bad habits of real relays if a test asks for them.

// habits are what a relay does but should not. smtptest has all of them, and always accepts truncated chunks; go-smtp's server
// has its own, and supports noSize.
type habits struct {
	takesCutChunk      bool // a last chunk truncated by the end of the connection is accepted (go-smtp 0.25.1 and older)
	readsRefusedChunks bool // the octets of a refused chunk are read as commands (go-smtp 0.25.0 and 0.24.0, nginx)
	keepsEnvelope      bool // RSET is answered 250 but does nothing
	noChunking         bool // CHUNKING is not offered
	noSize             bool // no limit of a message's size is announced
	refusesMail        bool // MAIL is refused
	refusesAuth        bool // AUTH is offered and refused, and MAIL with it
}

// strict is a relay that serves on a listener until the listener is closed.
type strict struct {
	habits
	ledger  *ledger
	serving sync.WaitGroup
	closing func()
}

func newStrict(l net.Listener, h habits, led *ledger) *strict {
	s := &strict{habits: h, ledger: led, closing: func() { l.Close() }}
	s.serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.serving.Go(func() { s.serve(c) })
		}
	})
	return s
}

// close ends the relay once all clients have disconnected.
func (s *strict) close() {
	s.closing()
	s.serving.Wait()
}

// dialogue is a connection to a strict relay.
type dialogue struct {
	*strict
	in  *bufio.Reader
	out *bufio.Writer

	greeted bool
	open    bool // a transaction is open
	from    string
	to      []string
	body    []byte // of the chunks so far
	chunked bool   // there were some
	errors  int
}

// errGone ends a dialogue.
var errGone = fmt.Errorf("gone")

func (s *strict) serve(c net.Conn) {
	defer c.Close()
	if t, ok := c.(*tls.Conn); ok && t.Handshake() != nil {
		return
	}
	d := &dialogue{strict: s, in: bufio.NewReaderSize(c, 16<<10), out: bufio.NewWriter(c)}
	d.say("220 strict.example ready")
	for {
		line, err := d.line()
		if err != nil || d.command(line) != nil {
			d.out.Flush()
			return
		}
	}
}

// line reads a line; replies are flushed when there is no more input.
func (d *dialogue) line() (string, error) {
	if d.in.Buffered() == 0 {
		if err := d.out.Flush(); err != nil {
			return "", err
		}
	}
	line, err := d.in.ReadSlice('\n')
	if err != nil {
		return "", err
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok {
		d.ledger.complain("a line without CR: %q", line)
	}
	return text, nil
}

func (d *dialogue) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\r\n", args...) }

// alone complains about a client that did not wait for the reply to a command that ends a group (RFC 2920, 3.1).
func (d *dialogue) alone(verb string) {
	if d.in.Buffered() > 0 {
		d.ledger.complain("the client did not wait for the reply to %s", verb)
	}
}

func (d *dialogue) reset() {
	d.open, d.from, d.to, d.body, d.chunked = false, "", nil, nil, false
}

func (d *dialogue) command(line string) error {
	verb, arg, _ := strings.Cut(line, " ")
	switch verb = strings.ToUpper(verb); {
	case verb == "EHLO":
		d.alone(verb)
		d.greeted = true
		d.say("250-strict.example")
		d.say("250-PIPELINING")
		d.say("250-8BITMIME")
		if d.refusesAuth {
			d.say("250-AUTH PLAIN")
		}
		if !d.noChunking {
			d.say("250-CHUNKING")
		}
		if !d.noSize {
			d.say("250-SIZE 67108864")
		}
		d.say("250 ENHANCEDSTATUSCODES")
	case verb == "QUIT":
		d.say("221 2.0.0 bye")
		return errGone
	case verb == "NOOP":
		d.say("250 2.0.0 ok")
	case verb == "RSET":
		if !d.keepsEnvelope {
			d.reset()
		}
		d.say("250 2.0.0 ok")
	case verb == "AUTH" && d.refusesAuth:
		d.say("535 5.7.8 wrong password")
	case verb == "MAIL":
		d.mail(path(arg))
	case verb == "RCPT":
		d.rcpt(path(arg))
	case verb == "DATA":
		return d.data()
	case verb == "BDAT":
		return d.bdat(strings.Fields(arg))
	default:
		d.say("500 5.5.2 unknown command")
		if d.errors++; d.errors > 3 {
			d.say("500 5.5.1 too many errors")
			return errGone
		}
	}
	return nil
}

// path is the address of FROM:<…> or TO:<…>.
func path(arg string) string {
	_, rest, _ := strings.Cut(arg, "<")
	addr, _, _ := strings.Cut(rest, ">")
	return addr
}

func (d *dialogue) mail(from string) {
	if d.ledger.messages[idOf(from)] == nil {
		d.ledger.complain("smuggled: MAIL from <%s>", from)
	}
	switch {
	case !d.greeted || d.open:
		if !d.keepsEnvelope {
			d.ledger.complain("MAIL out of order")
		}
		d.say("503 5.5.1 not now")
	case d.refusesAuth:
		d.say("530 5.7.0 authenticate first")
	case d.refusesMail:
		d.say("550 5.7.1 not from you")
	default:
		d.open, d.from = true, from
		d.say("250 2.1.0 ok")
	}
}

func (d *dialogue) rcpt(to string) {
	if d.ledger.messages[idOf(to)] == nil {
		d.ledger.complain("smuggled: RCPT to <%s>", to)
	}
	switch {
	case !d.open:
		d.say("503 5.5.1 MAIL first")
	case isRefused(to):
		d.say("%s", refusal(to))
	default:
		d.to = append(d.to, to)
		d.say("250 2.1.5 ok")
	}
}

func (d *dialogue) data() error {
	if len(d.to) == 0 || d.chunked {
		d.say("503 5.5.1 RCPT first")
		return nil
	}
	d.alone("DATA")
	d.say("354 go on")
	var body []byte
	for {
		line, err := d.line()
		if err != nil {
			return err
		}
		if line == "." {
			break
		}
		body = append(append(body, strings.TrimPrefix(line, ".")...), "\r\n"...)
	}
	d.accept(body)
	return nil
}

// accept accepts the message and replies.
func (d *dialogue) accept(body []byte) {
	d.ledger.accept(d.from, d.to, body)
	d.reset()
	d.say("250 2.0.0 queued as Q1")
}

func (d *dialogue) bdat(args []string) error {
	size := -1
	if len(args) == 1 || len(args) == 2 && args[1] == "LAST" {
		if n, err := strconv.Atoi(args[0]); err == nil {
			size = n
		}
	}
	if size < 0 {
		d.say("501 5.5.4 not a chunk")
		return nil
	}
	if len(d.to) == 0 {
		d.say("503 5.5.1 RCPT first")
		if d.readsRefusedChunks {
			return nil
		}
		_, err := io.CopyN(io.Discard, d.in, int64(size))
		return err
	}
	if d.in.Buffered() == 0 { // like a relay that replies before it reads the chunk
		if err := d.out.Flush(); err != nil {
			return err
		}
	}
	d.chunked = true
	chunk := make([]byte, size)
	n, err := io.ReadFull(d.in, chunk)
	d.body = append(d.body, chunk[:n]...)
	ended := err == io.EOF || err == io.ErrUnexpectedEOF
	switch {
	case ended && d.takesCutChunk && len(args) == 2:
		d.accept(d.body)
		return errGone
	case err != nil:
		return err
	case len(args) == 2:
		d.accept(d.body)
	default:
		d.say("250 2.0.0 %d octets", size)
	}
	return nil
}
