// Package hostile has relays that flood, drip and lie, and tests of how Send handles them.
package hostile

import (
	"bufio"
	"cmp"
	"crypto/tls"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// step is the point of the dialogue at which a relay attacks.
type step string

const (
	greeting step = "greeting"
	ehlo     step = "EHLO"
	startTLS step = "STARTTLS" // its reply
	tlsStart step = "TLS"      // in place of the handshake
	auth     step = "AUTH"
	mail     step = "MAIL"
	rcpt     step = "RCPT"
	data     step = "DATA" // DATA or a chunk that is not the last
	body     step = "body" // in place of reading it
	end      step = "end"  // the reply to the final dot or the last chunk
	idle     step = "idle" // after that reply, unasked
	quit     step = "QUIT"
)

// relay is a scripted relay on a loopback socket. It is polite except at one step, at which it calls act.
type relay struct {
	at       step
	act      func(c *conn, polite string) // polite is what the reply should be
	offers   string                       // EHLO keywords besides the usual ones
	tls      *tls.Config                  // for STARTTLS
	patience time.Duration                // after this time without input it closes; 0 means giveUp
	listener net.Listener

	accepted atomic.Int64 // messages accepted by the polite part
	flooded  atomic.Int64 // octets that floods wrote
	serving  sync.WaitGroup
}

// start listens and serves until stop.
func (r *relay) start() (err error) {
	if r.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	r.serving.Go(func() {
		for {
			nc, err := r.listener.Accept()
			if err != nil {
				return
			}
			r.serving.Go(func() {
				defer nc.Close()
				nc.SetDeadline(time.Now().Add(cmp.Or(r.patience, giveUp)))
				(&conn{Conn: nc, relay: r, br: bufio.NewReader(nc)}).serve()
			})
		}
	})
	return nil
}

// giveUp ends a relay whose client neither sends nor closes.
const giveUp = 10 * time.Second

func (r *relay) stop() {
	r.listener.Close()
	r.serving.Wait()
}

// conn is one connection of a relay.
type conn struct {
	net.Conn
	relay *relay
	br    *bufio.Reader
	gone  bool // nothing more may be sent
	rcpts int
}

// say writes text unchanged.
func (c *conn) say(text string) {
	if _, err := io.WriteString(c.Conn, text); err != nil {
		c.gone = true
	}
}

// reply gives the polite reply, unless this is the step.
func (c *conn) reply(at step, polite string) {
	if c.relay.at != at {
		c.say(polite + "\r\n")
		return
	}
	c.relay.act(c, polite)
}

func (c *conn) serve() {
	c.reply(greeting, "220 relay.example ESMTP")
	for !c.gone {
		line, err := c.br.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimRight(line, "\r\n")
		verb, rest, _ := strings.Cut(strings.ToUpper(line), " ")
		switch verb {
		case "EHLO":
			offers := "250-relay.example\r\n"
			for _, keyword := range strings.Split(c.relay.offers, ",") {
				offers += "250-" + keyword + "\r\n"
			}
			if _, over := c.Conn.(*tls.Conn); c.relay.tls != nil && !over {
				offers += "250-STARTTLS\r\n"
			}
			c.reply(ehlo, offers+"250 8BITMIME")
		case "STARTTLS":
			c.reply(startTLS, "220 go ahead")
			if !c.gone {
				c.upgrade()
			}
		case "AUTH":
			c.reply(auth, "235 2.7.0 welcome")
		case "MAIL":
			c.rcpts = 0
			c.reply(mail, "250 2.1.0 ok")
		case "RCPT":
			c.rcpts++
			c.reply(rcpt, "250 2.1.5 ok")
		case "DATA":
			c.reply(data, "354 go ahead")
			if !c.gone {
				c.take(func() error { return skipToDot(c.br) }, true)
			}
		case "BDAT":
			size, last := strings.CutSuffix(rest, " LAST")
			n, err := strconv.ParseInt(size, 10, 64)
			if err != nil {
				return
			}
			c.take(func() error { _, err := io.CopyN(io.Discard, c.br, n); return err }, last)
		case "RSET", "NOOP":
			c.say("250 2.0.0 ok\r\n")
		case "QUIT":
			c.reply(quit, "221 2.0.0 bye")
			return
		default:
			c.say("500 5.5.1 what?\r\n")
		}
	}
}

// take reads a part of a body and replies to it.
func (c *conn) take(read func() error, last bool) {
	if c.relay.at == body {
		c.relay.act(c, "")
	}
	if c.gone || read() != nil {
		c.gone = true
		return
	}
	switch {
	case c.rcpts == 0:
		c.say("503 5.5.1 no recipients\r\n")
	case !last:
		c.reply(data, "250 2.0.0 so far")
	default:
		if c.relay.at != end {
			c.relay.accepted.Add(1) // before the reply, so that it is counted when the client has the reply
		}
		c.reply(end, "250 2.0.0 queued as 4F1D2")
		if c.relay.at == idle {
			c.relay.act(c, "")
		}
	}
}

func (c *conn) upgrade() {
	if c.relay.at == tlsStart {
		c.relay.act(c, "")
		if c.gone {
			return
		}
	}
	over := tls.Server(c.Conn, c.relay.tls)
	if over.Handshake() != nil {
		c.gone = true
		return
	}
	c.Conn, c.br = over, bufio.NewReader(over)
}

// skipToDot reads up to the final dot.
func skipToDot(br *bufio.Reader) error {
	for {
		line, err := br.ReadString('\n')
		if err != nil || line == ".\r\n" {
			return err
		}
	}
}

// The attacks.

// say replies with text, in place of the polite reply.
func say(text string) func(*conn, string) {
	return func(c *conn, _ string) { c.say(text) }
}

// also sends the polite reply with text before and after.
func also(before, after string) func(*conn, string) {
	return func(c *conn, polite string) { c.say(before + polite + "\r\n" + after) }
}

// flood sends first, and then text for as long as the client reads.
func flood(first, text string) func(*conn, string) {
	return func(c *conn, _ string) {
		c.say(first)
		chunk := strings.Repeat(text, 1+(32<<10)/len(text))
		for !c.gone && c.relay.flooded.Load() < floodEnd {
			n, err := io.WriteString(c.Conn, chunk)
			c.relay.flooded.Add(int64(n))
			c.gone = err != nil
		}
		c.gone = true
	}
}

// floodEnd is where a flood stops, to detect a client that reads all of it.
const floodEnd = 256 << 20

// drip sends text, or the polite reply if it is "", one octet at a time, for ever if endless.
func drip(text string, endless bool) func(*conn, string) {
	return func(c *conn, polite string) {
		if text == "" {
			text = polite + "\r\n"
		}
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for first := true; first || endless; first = false {
			for i := 0; i < len(text) && !c.gone; i++ {
				c.say(text[i : i+1])
				<-tick.C
			}
			if c.gone {
				return
			}
		}
	}
}

// silent sends nothing and waits for the client to close.
func silent(c *conn, _ string) {
	io.Copy(io.Discard, c.Conn)
	c.gone = true
}

// hangUp closes gracefully, reset does not.
func hangUp(c *conn, _ string) { c.gone = true; c.Conn.Close() }

func reset(c *conn, _ string) {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	hangUp(c, "")
}

// then runs several acts in order.
func then(acts ...func(*conn, string)) func(*conn, string) {
	return func(c *conn, polite string) {
		for _, act := range acts {
			if !c.gone {
				act(c, polite)
			}
		}
	}
}
