// The limit: octets in the best order that the protocol allows, from a sender that knows the replies beforehand.

package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// A raw sender keeps the same rules as the clients (no more connections than allowed, no more messages on each, QUIT, nothing
// sent before a greeting or ahead of STARTTLS and EHLO, RSET between an unanswered final dot and the next MAIL, LAST on an empty
// chunk only) and does nothing else: it prepares its octets once, writes them, and counts replies.

var authPlain = "AUTH PLAIN " + base64.StdEncoding.EncodeToString([]byte("\x00"+username+"\x00"+password)) + "\r\n"

const (
	rawMail = "MAIL FROM:<" + sender + ">\r\nRCPT TO:<" + recipient + ">\r\n"
	rawData = rawMail + "DATA\r\n"
	rawLast = "BDAT 0 LAST\r\n"
	rawRset = "RSET\r\n"
	rawQuit = "QUIT\r\n"
)

// rawConn is a connection after the greeting and EHLO.
type rawConn struct {
	net.Conn
	r *bufio.Reader
}

func dialRaw(j job, conf *tls.Config) (*rawConn, error) {
	conn, err := j.connect()
	if err != nil {
		return nil, err
	}
	c := &rawConn{conn, bufio.NewReaderSize(conn, 4096)}
	if err := c.open(j, conf); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *rawConn) open(j job, conf *tls.Config) error {
	if j.TLS == tlsImplicit {
		c.secure(conf)
	}
	if err := c.expect("220"); err != nil {
		return err
	}
	if err := c.ask("EHLO "+hello+"\r\n", "250"); err != nil || j.TLS != tlsStart {
		return err
	}
	if err := c.ask("STARTTLS\r\n", "220"); err != nil {
		return err
	}
	c.secure(conf)
	return c.ask("EHLO "+hello+"\r\n", "250")
}

func (c *rawConn) secure(conf *tls.Config) {
	c.Conn = tls.Client(c.Conn, conf)
	c.r.Reset(c.Conn)
}

// expect reads as many replies as there are codes.
func (c *rawConn) expect(codes ...string) error {
	for _, code := range codes {
		for {
			line, err := c.r.ReadSlice('\n')
			if err != nil {
				return err
			}
			if len(line) < 4 || string(line[:3]) != code {
				return fmt.Errorf("want %s, got %s", code, bytes.TrimSpace(line))
			}
			if line[3] != '-' {
				break
			}
		}
	}
	return nil
}

func (c *rawConn) ask(command string, codes ...string) error {
	if _, err := io.WriteString(c, command); err != nil {
		return err
	}
	return c.expect(codes...)
}

// ended reads the relay's close, so that the slot at the relay is free.
func (c *rawConn) ended() {
	io.Copy(io.Discard, c.r)
	c.Close()
}

// onEachConn runs one goroutine for each connection that senders can use. Each opens one connection after the other and gives it
// to drive, which sends at most j.Rotate messages on it and returns the number of the message to send first on the next
// connection, or 0. If the number of messages is known, each goroutine has an equal share, so that none opens a connection for
// the last few.
func onEachConn(j job, src *source, drive func(c *rawConn, first int64, next func() int64) (int64, error)) error {
	conf := clientTLS(j)
	errs := make([]error, min(j.Conns, j.Senders))
	var all sync.WaitGroup
	for i := range errs {
		share := -1
		if j.Messages > 0 {
			share = (j.Messages + i) / len(errs)
		}
		next := func() int64 {
			if share == 0 {
				return 0
			}
			share--
			return src.next()
		}
		all.Go(func() {
			n := next()
			for n > 0 {
				c, err := dialRaw(j, conf)
				if err == nil {
					n, err = drive(c, n, next)
					c.ended()
				}
				if err != nil {
					errs[i] = err
					return
				}
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// runRawData sends with DATA. With more senders than connections, the next envelope follows the final dot in one write: one round
// trip per message. Otherwise a message waits for the one before it: two.
func runRawData(j job, src *source, t *tally) error {
	overlap := j.Senders > j.Conns
	return onEachConn(j, src, func(c *rawConn, n int64, next func() int64) (int64, error) {
		message := newMessage(j.Size)
		body := len(message)
		message = append(message, ".\r\n"...)
		dotted := len(message)
		if err := c.ask(authPlain+rawData, "235", "250", "250", "354"); err != nil {
			return 0, err
		}
		for sent := 1; ; sent++ {
			stamp(message[:body], n)
			following := int64(0)
			if overlap {
				following = next()
			}
			last := sent == j.Rotate || overlap && following == 0
			out := message[:dotted]
			switch {
			case last:
				out = append(out, rawQuit...)
			case overlap:
				out = append(out, rawRset+rawData...)
			}
			if _, err := c.Write(out); err != nil {
				return 0, err
			}
			if err := c.expect("250"); err != nil {
				t.done(err)
				return 0, err
			}
			t.done(nil)
			if !overlap {
				following = next()
			}
			switch {
			case last:
				return following, c.expect("221")
			case overlap:
				if err := c.expect("250", "250", "250", "354"); err != nil {
					return 0, err
				}
			case following == 0:
				return 0, c.ask(rawQuit, "221")
			default:
				if err := c.ask(rawData, "250", "250", "354"); err != nil {
					return 0, err
				}
			}
			n = following
		}
	})
}

// runRawChunking sends with BDAT: the envelope, the message as a chunk and the empty last chunk in one write, and up to
// j.InFlight of these before the reply to the first, if there are enough senders: one round trip for as many messages. It does
// not probe the relay first, and does not wait for envelopes.
func runRawChunking(j job, src *source, t *tally) error {
	depth := min(max(j.InFlight, 1), max(j.Senders/j.Conns, 1))
	return onEachConn(j, src, func(c *rawConn, n int64, next func() int64) (int64, error) {
		message := newMessage(j.Size)
		bdat := fmt.Sprintf("BDAT %d\r\n", len(message))
		var out []byte
		var replies []string // to what was written, not read yet
		begun, answered := 0, 0
		for {
			out = out[:0]
			for n > 0 && begun < j.Rotate && begun-answered < depth {
				stamp(message, n)
				switch {
				case begun == 0:
					out = append(out, authPlain...)
					replies = append(replies, "235")
				case begun > answered:
					out = append(out, rawRset...)
					replies = append(replies, "250")
				}
				out = append(out, rawMail...)
				out = append(out, bdat...)
				out = append(out, message...)
				out = append(out, rawLast...)
				replies = append(replies, "250", "250", "250", "end")
				begun++
				if depth > 1 || begun-answered < depth {
					n = next()
				} else {
					n = -1 // taken from src once this one is answered
				}
				if begun == j.Rotate || n == 0 {
					out = append(out, rawQuit...)
					replies = append(replies, "221")
				}
			}
			if len(out) > 0 {
				if _, err := c.Write(out); err != nil {
					return 0, err
				}
			}
			// Read up to the reply to a message, and everything else that has arrived with it.
			for more := true; more; {
				code := replies[0]
				replies = replies[1:]
				final := code == "end"
				if final {
					code = "250"
				}
				err := c.expect(code)
				if final {
					t.done(err)
					answered++
				}
				if err != nil {
					return 0, err
				}
				more = len(replies) > 0 && (!final || c.r.Buffered() > 0)
			}
			if n < 0 {
				if n = next(); n == 0 && begun < j.Rotate {
					return 0, c.ask(rawQuit, "221")
				}
			}
			if len(replies) == 0 && (n == 0 || begun == j.Rotate) {
				return n, nil
			}
		}
	})
}

// runTwoRoundTrips stands for a client that pipelines only within a message: the envelope in one write, then the body. It is the
// raw sender without overlap.
func runTwoRoundTrips(j job, src *source, t *tally) error {
	return keep(j, src, t, keeper[*rawConn]{
		dial: func() (*rawConn, error) {
			c, err := dialRaw(j, clientTLS(j))
			if err != nil {
				return nil, err
			}
			return c, c.ask(authPlain, "235")
		},
		send: func(c *rawConn, message []byte, _ int64) error {
			if err := c.ask(rawData, "250", "250", "354"); err != nil {
				return err
			}
			if _, err := c.Write(append(message, ".\r\n"...)); err != nil {
				return err
			}
			return c.expect("250")
		},
		quit: func(c *rawConn) {
			c.ask(rawQuit, "221")
			c.ended()
		},
	})
}
