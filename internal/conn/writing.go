package conn

import (
	"context"
	"crypto/tls"
	"time"
)

// Writing. Only the holder of the write side calls these.

// Write writes p to the network; the buffer out flushes into it. Once the connection is lost it writes nothing more, which is why a
// message whose final dot was not written by then is known not to be accepted.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	if c.phase >= draining {
		c.mu.Unlock()
		return 0, c.ending.cause
	}
	c.attempted = c.written + int64(len(p))
	c.boundUnackedLocked()
	c.mu.Unlock()
	n, err := c.conn.Write(p)
	c.mu.Lock()
	before := c.written
	c.written += int64(n)
	c.attempted = c.written
	if n >= outBuffer {
		c.moved = time.Now()
	}
	if !c.waiting.empty() && c.waiting.oldest().end > before {
		c.armLocked() // the limit for this reply starts now that its command has left
	}
	c.wrote.Broadcast()
	c.mu.Unlock()
	if err != nil {
		c.writeFailed(err)
	}
	return n, err
}

// boundUnackedLocked sets Timeouts.Unacked on the socket, but not while the relay has more before it than its window may hold: Linux
// gives up a peer, too, that acknowledges and has no room for more, and a relay may think about a message for minutes.
func (c *Conn) boundUnackedLocked() {
	limit := c.o.Timeouts.Unacked
	if crowded := c.attempted-c.answered > leastWindow; limit > 0 && crowded != c.crowded {
		if c.crowded = crowded; crowded {
			limit = 0
		}
		c.raw.setUnacked(limit)
	}
}

// leastWindow is how much fits into the window of any relay.
const leastWindow = 16 << 10

// position is the number of octets written so far, those in the buffer included.
func (c *Conn) position() int64 { return c.written + int64(c.out.Buffered()) }

// expect appends an exchange for the command that is written next. It returns false if the connection is lost.
func (c *Conn) expect(x exchange) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending.cause != nil {
		return false
	}
	c.waiting.add(x)
	switch {
	case x.final:
		c.pending++
		c.unended = false
	case x.tx != nil:
		x.tx.asked++
	}
	if c.waiting.alone() || x.final && c.waiting.oldest().left {
		c.armLocked()
	}
	return true
}

// Flush writes the buffer to the network.
func (c *Conn) Flush() error { return c.out.Flush() }

// sendOff flushes the buffer in another goroutine and waits for that. If ctx ends first it returns false: the caller no longer holds
// the write side, and the connection ends once the buffer is flushed.
func (c *Conn) sendOff(ctx context.Context) bool {
	c.abandoned.Store(false)
	if !c.owner.SendAway() {
		return true // the connection is gone
	}
	select {
	case <-c.sent:
		return true
	case <-ctx.Done():
	}
	if c.abandoned.CompareAndSwap(false, true) {
		return false
	}
	<-c.sent
	return true
}

// SendAway flushes the buffer for sendOff. If sendOff has stopped waiting it ends the connection afterwards.
func (c *Conn) SendAway() {
	c.Flush()
	if c.abandoned.CompareAndSwap(false, true) {
		c.sent <- struct{}{}
	} else {
		c.fail(errGivenUp)
	}
}

// Quit writes QUIT unless that was done. The read loop does the rest.
func (c *Conn) Quit() {
	c.mu.Lock()
	said := c.quitting || c.ending.cause != nil
	c.mu.Unlock()
	if said || !c.writeQuit(false) || c.Flush() != nil {
		return
	}
	c.mu.Lock()
	alone := c.waiting.empty() || c.waiting.alone()
	c.mu.Unlock()
	if alone { // else once the reply to QUIT is in: until then there are messages for which the relay may look whether we are there
		c.endTLS()
	}
}

// writeQuit puts QUIT into the buffer; behind tells whether it stands behind a final dot that has no reply yet.
func (c *Conn) writeQuit(behind bool) bool {
	const command = "QUIT\r\n"
	end := c.position() + int64(len(command))
	if !c.expect(exchange{op: StepQuit, limit: c.o.Timeouts.untilFIN(), first: behind, end: end}) {
		return false
	}
	c.mu.Lock()
	c.quitting = true
	c.mu.Unlock()
	c.out.WriteString(command)
	c.traceCommand(context.Background(), "QUIT")
	return true
}

// endTLS tells the relay that the end of TLS is meant (RFC 8446, 6.1). It is for a session that has ended in order: one that is
// given up in the middle of a message must not look like it.
func (c *Conn) endTLS() {
	if tc, ok := c.conn.(*tls.Conn); ok {
		tc.CloseWrite() // which takes five seconds at most; the relay reads, or is not there any more
	}
}

func (c *Conn) traceCommand(ctx context.Context, line string) {
	if c.trace.Command != nil {
		c.trace.Command(ctx, line)
	}
}
