package smtptest

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// readBuffer is the longest command line, and the most that one read from a client returns.
const readBuffer = 64 << 10

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// conn is the relay's side of a connection. It stands between the client and go-smtp's server: it terminates TCP and TLS, knows
// which command each reply belongs to, and applies the faults; go-smtp parses the commands and checks their order. It hands
// go-smtp one command at a time, and flushes the replies when there is no more input.
type conn struct {
	s    *Server
	wire *wire
	cut  chan struct{} // closed by abandon
	once sync.Once     // of abandon

	// owned by the connection's goroutine, and by go-smtp's while conn waits for its reply
	rw         io.ReadWriter // wire, or TLS over it
	tls        *tls.Conn     // nil in plaintext
	br         *bufio.Reader
	bw         *bufio.Writer
	back       *netpipe.Conn // to go-smtp
	backR      *bufio.Reader
	line       []byte // buffer for a line to go-smtp
	events     [steps]int
	messages   int // accepted
	recipients int // accepted, in all transactions
	authed     bool
	authLed    bool                  // the last AUTH was pipelined with later commands
	path       string                // of the MAIL or RCPT that go-smtp is asked about, as written between the brackets
	ours       smtprelay.MailOptions // the parameters of that MAIL that go-smtp does not parse
	env        envelope
	msg        incoming
	metBody    []*FaultHandle // faults that have met the body
	finalTurns int64          // turns when the last final dot was answered; -1 if there was none since the last MAIL
	refuse     int            // how many of the octets read follow a final dot and are refused for it
	discard    bool           // a fault wants what has arrived after the current command discarded

	// guarded by s.mu
	stats       ConnStats
	turnsBefore int    // turns before the one with the first MAIL
	where       string // the current activity, logged by Close if the connection hangs
	idle        bool   // waits for a command, and may be woken
	woken       bool   // by a change of the read deadline
	lingering   bool
	over        bool
}

// ending says whether and how a connection ends.
type ending int

const (
	goOn   ending = iota
	hangUp        // close like a real relay: TLS's close_notify, FIN
	drop          // FIN alone
	reset         // RST
	lost          // the client has closed, or abandon was called
)

func newConn(s *Server, l link, number, addr int) *conn {
	c := &conn{s: s, cut: make(chan struct{}), finalTurns: -1, where: "connecting"}
	c.wire = &wire{link: l, in: bufio.NewReaderSize(l, readBuffer), delay: s.Delay}
	c.rw = c.wire
	c.br = bufio.NewReaderSize(input{c}, readBuffer)
	c.bw = bufio.NewWriter(output{c})
	c.msg = incoming{max: s.MaxSize, drop: s.DropBodies}
	c.stats = ConnStats{Conn: number, Addr: addr, Commands: make(map[string]int)}
	return c
}

// input reads from the client, after sending all replies that the client may be waiting for. If they cannot be sent any more, it
// still reads what the client sent before it closed: a relay accepts a message whose sender does not wait for the reply.
type input struct{ c *conn }

func (in input) Read(p []byte) (int, error) {
	in.c.bw.Flush()
	return in.c.rw.Read(p)
}

type output struct{ c *conn }

func (out output) Write(p []byte) (int, error) { return out.c.rw.Write(p) }

// run is the connection's goroutine. It ends when either side closes, or when abandon cuts it off.
func (c *conn) run(opened time.Time) {
	end := lost
	if c.arrive(opened) {
		end = c.talk()
	}
	c.leave(end)
}

// arrive waits, on a link with a delay, until the client's acknowledgement of the connection has arrived; only then does the
// relay see the connection.
func (c *conn) arrive(opened time.Time) bool {
	if c.s.Delay == 0 {
		return true
	}
	return c.pause(time.Until(opened.Add(c.s.Delay / 2)))
}

// talk runs the whole dialogue and returns how it ended.
func (c *conn) talk() ending {
	refused := c.enter()
	if c.s.implicitTLS {
		if end := c.handshake(); end != goOn {
			return end
		}
	}
	if refused {
		c.say("421 4.7.0 Too many concurrent SMTP connections")
		return hangUp
	}
	b := c.meet(Event{Step: Connect})
	if c.tls == nil && b.end != lost && c.wire.Unread() > 0 {
		c.say("421 4.5.0 You talk too soon")
		return hangUp
	}
	greeting := func() string { return "220 SG ESMTP service ready at " + c.s.Name }
	if end := c.answer(b, greeting); end != goOn {
		return end
	}
	if !c.dialBackend() {
		return lost
	}
	for {
		if c.discard {
			c.discardArrived()
		}
		line, end := c.command()
		if end == goOn {
			end = c.do(line)
		}
		if end != goOn {
			return end
		}
	}
}

// enter counts the connection and reports whether it exceeds MaxConns.
func (c *conn) enter() (refused bool) {
	s := c.s
	c.note("opened by ", c.wire.RemoteAddr().String())
	s.mu.Lock()
	defer s.mu.Unlock()
	c.stats.Open = true
	s.open++
	s.maxOpen = max(s.maxOpen, s.open)
	if s.MaxConns > 0 && s.open > s.MaxConns {
		c.stats.Refused = true
		s.refused++
	}
	return c.stats.Refused
}

// exit counts the connection as closed.
func (c *conn) exit() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.stats.Open {
		c.stats.Open = false
		c.s.open--
	}
}

// leave closes the connection.
func (c *conn) leave(end ending) {
	c.is("sending the last reply")
	if end != lost {
		c.bw.Flush()
	}
	c.exit() // before the client can see it
	c.note("closed")
	if c.back != nil {
		c.back.Close()
	}
	switch end {
	case reset:
		c.wire.Reset()
	case hangUp, drop:
		if end == hangUp && c.tls != nil {
			c.tls.CloseWrite()
		}
		c.wire.CloseWrite()
		c.linger()
	}
	c.wire.Close()
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.over = true
	c.s.over++
	c.s.forgetConnsLocked()
}

// linger keeps reading until the client has closed too.
func (c *conn) linger() {
	c.s.mu.Lock()
	c.where = "waiting for the client to close"
	c.lingering = true
	c.wire.SetReadDeadline(time.Now().Add(lingerTime))
	if c.s.closing {
		c.wakeLocked()
	}
	c.s.mu.Unlock()
	io.Copy(io.Discard, c.wire.link)
}

// abandon ends the connection from any goroutine.
func (c *conn) abandon() {
	c.once.Do(func() {
		c.exit()
		close(c.cut)
		c.wire.Close()
	})
}

// wakeLocked makes an idle connection look at faults and closing again, and shortens the wait of one that lingers.
func (c *conn) wakeLocked() {
	switch {
	case c.idle:
		c.woken = true
		c.wire.SetReadDeadline(longAgo)
	case c.lingering && c.s.closing:
		c.wire.SetReadDeadline(time.Now().Add(c.s.Delay + 50*time.Millisecond))
	}
}

// is records what the connection does.
func (c *conn) is(where string) {
	c.s.mu.Lock()
	c.where = where
	c.s.mu.Unlock()
}

func (c *conn) whereLocked() string {
	return fmt.Sprintf("%s, after %d messages begun and %d accepted", c.where, c.stats.Mails, c.stats.Accepted)
}

// say writes a reply, whose lines are separated by "\n", to the write buffer.
func (c *conn) say(reply string) {
	c.env.refused = c.env.refused || !positive(reply)
	for line := range strings.SplitSeq(reply, "\n") {
		c.log("S", line)
		c.bw.WriteString(line)
		c.bw.WriteString("\r\n")
	}
}

// positive reports whether a reply is 2xx or 3xx.
func positive(reply string) bool {
	if len(reply) < 3 {
		return false
	}
	code, err := strconv.Atoi(reply[:3])
	return err == nil && 200 <= code && code < 400
}

// answer sends the blow's reply, or else the reply that carry returns.
func (c *conn) answer(b blow, carry func() string) ending {
	reply := b.reply
	if !b.refuses() {
		own := carry()
		if own == "" {
			return lost
		}
		if reply == "" {
			reply = own
		}
	}
	if reply != "" {
		c.say(reply)
	}
	return b.end
}
