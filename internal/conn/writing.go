package conn

import (
	"context"
	"crypto/tls"
	"time"
)

// Writing. Only the holder of the write side may call these functions.

// Write writes p to the network; c.out flushes to it. Write fails once the connection is lost. So a message whose final dot was not
// written before is known not to be accepted.
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

// boundUnackedLocked sets Timeouts.Unacked on the socket, except while the relay may have a full receive window. Linux also
// aborts a connection whose peer acknowledges but has no room for more data, and a relay may process a message for minutes.
func (c *Conn) boundUnackedLocked() {
	limit := c.o.Timeouts.Unacked
	if crowded := c.attempted-c.answered > leastWindow; limit > 0 && crowded != c.crowded {
		if c.crowded = crowded; crowded {
			limit = 0
		}
		c.raw.setUnacked(limit)
	}
}

// leastWindow is a number of octets that fits the TCP receive window of any relay.
const leastWindow = 16 << 10

// position returns the number of octets written so far, including those in the buffer.
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

// sendOff flushes the buffer in another goroutine and waits for it. If ctx ends first, sendOff returns false: the caller no
// longer holds the write side, and the connection ends after the flush.
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

// SendAway flushes the buffer for sendOff. If sendOff has stopped waiting, SendAway ends the connection after the flush.
func (c *Conn) SendAway() {
	c.Flush()
	if c.abandoned.CompareAndSwap(false, true) {
		c.sent <- struct{}{}
	} else {
		c.fail(errGivenUp)
	}
}

// Quit writes QUIT, unless it was written before. The read loop then reads the reply and closes the connection.
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
	if alone { // otherwise deliver does it after the reply to QUIT: a relay may drop a message whose client has closed its side
		c.endTLS()
	}
}

// writeQuit puts QUIT into the buffer; afterDot says whether it follows an unanswered final dot.
func (c *Conn) writeQuit(afterDot bool) bool {
	const command = "QUIT\r\n"
	end := c.position() + int64(len(command))
	if !c.expect(exchange{op: StepQuit, limit: c.o.Timeouts.untilFIN(), first: afterDot, end: end}) {
		return false
	}
	c.mu.Lock()
	c.quitting = true
	c.mu.Unlock()
	c.out.WriteString(command)
	c.traceCommand(context.Background(), "QUIT")
	return true
}

// endTLS sends close_notify, which marks the end of TLS as intended (RFC 8446, 6.1). It must not be called if the connection
// ends in the middle of a message.
func (c *Conn) endTLS() {
	if tc, ok := c.conn.(*tls.Conn); ok {
		tc.CloseWrite() // crypto/tls limits this write to five seconds
	}
}

func (c *Conn) traceCommand(ctx context.Context, line string) {
	if c.trace.Command != nil {
		c.trace.Command(ctx, line)
	}
}
