package conn

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// progressConn is the network connection below TLS. A write fails if the relay reads nothing for limit, or less than leastRate on
// average. A blocked write can be interrupted, and then every later write fails.
//
// The limit is a time budget. Writing spends it, and each octet written earns back 1/leastRate seconds, up to limit. So a relay
// may read nothing for limit, but cannot hold a writer forever by reading a few octets now and then.
type progressConn struct {
	net.Conn
	limit time.Duration // the time budget of writes; 0 means no limit
	spent time.Duration // the part of limit that is spent; owned by the writer
	until time.Time     // the write deadline; owned by the writer

	socket syscall.RawConn // nil if nc has no socket, or the system has no socket options to set
	hasten bool            // the relay may be waiting for a TCP acknowledgement; owned by the reader

	mu          sync.Mutex // guards the fields below; held while a deadline is set, so that none replaces that of interrupt or abandon
	interrupted bool
	abandoned   bool
	readBy      time.Time // the read deadline; zero means none
	wakeAt      time.Time // the read deadline that the network connection knows, at or before readBy; zero means none
}

// newProgressConn returns nc with writes bounded by limit. The kernel aborts the connection when sent data is not acknowledged for
// unacked. For both, 0 means no limit.
func newProgressConn(nc net.Conn, limit, unacked time.Duration) *progressConn {
	c := &progressConn{Conn: nc, limit: limit}
	if sc, ok := nc.(syscall.Conn); ok && acknowledges {
		if raw, err := sc.SyscallConn(); err == nil {
			c.socket = raw
		}
	}
	if unacked > 0 {
		c.setUnacked(unacked)
	}
	return c
}

// setUnacked makes the kernel abort the connection when sent data is not acknowledged for d; 0 means the kernel's default.
func (c *progressConn) setUnacked(d time.Duration) {
	if c.socket != nil {
		c.socket.Control(func(fd uintptr) { SetUnacked(fd, d) })
	}
}

// Read implements io.Reader. If the reader has set hasten, Read acknowledges earlier data first. Some relays write each reply
// separately, and their kernel delays a reply until the previous one is acknowledged (RFC 896). Our kernel delays that
// acknowledgement by 40 ms if it has nothing to send.
func (c *progressConn) Read(p []byte) (int, error) {
	if c.hasten {
		c.hasten = false
		if c.socket != nil {
			c.socket.Control(acknowledge)
		}
	}
	for {
		n, err := c.Conn.Read(p)
		if n > 0 || !isOver(err) || !c.readsOn() {
			return n, err
		}
	}
}

// SetReadDeadline implements net.Conn. A deadline that is postponed costs next to nothing: the network connection keeps the earlier
// one, and Read goes on after that. After abandon it has no effect.
func (c *progressConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readBy = t
	if t.IsZero() || !c.wakeAt.IsZero() && !t.Before(c.wakeAt) {
		return nil
	}
	c.wakeAt = t
	return c.Conn.SetReadDeadline(t)
}

// readsOn is called after a timeout. It sets the read deadline and returns true if the deadline was postponed. A connection from
// Config.Dial may have timeouts of its own, which come before any deadline and end the read, and deadlines that are a little early.
func (c *progressConn) readsOn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	own := c.wakeAt.IsZero() || time.Until(c.wakeAt) > time.Second
	postponed := c.readBy.IsZero() || c.readBy.After(c.wakeAt)
	if c.abandoned || own || !postponed {
		return false
	}
	c.wakeAt = c.readBy
	return c.Conn.SetReadDeadline(c.readBy) == nil
}

var errInterrupted = errors.New("write interrupted")

// leastRate is how many octets a second a relay must read on average, once slower writes have spent Timeouts.Write. The rate is
// so low that only a relay that stalls on purpose fails it: aborting a slow but honest transfer would waste the work.
const leastRate = 8

// Write implements io.Writer.
func (c *progressConn) Write(p []byte) (n int, err error) {
	for {
		began := time.Now()
		if !c.extend(began.Add(c.limit - c.spent)) {
			return n, errInterrupted
		}
		var k int
		k, err = c.Conn.Write(p[n:])
		n += k
		c.spent = max(c.spent+time.Since(began)-time.Duration(k)*time.Second/leastRate, 0)
		if k > 0 && n < len(p) && errors.Is(err, os.ErrDeadlineExceeded) {
			if c.spent < c.limit {
				continue // slow, but progressing
			}
			err = fmt.Errorf("the relay reads less than %d octets a second: %w", leastRate, err)
		}
		return n, err
	}
}

// extend sets the write deadline, unless that of an earlier write is early by less than a slackShare of the limit. A deadline that
// passes early cannot be mended here, as that of a read can: a TLS connection from Config.Dial would not write again. extend
// returns false if writes were interrupted.
func (c *progressConn) extend(deadline time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.interrupted {
		return false
	}
	if early := deadline.Sub(c.until); c.limit > 0 && (early < 0 || early >= c.limit/slackShare) {
		c.until = deadline
		c.Conn.SetWriteDeadline(deadline)
	}
	return true
}

// slackShare is the divisor of Timeouts.Write for how much earlier a write deadline may be: 5 s of 5 minutes. To set it for each
// write would be a good part of the cost of a message.
const slackShare = 60

// interrupt makes a write in progress and every later write fail.
func (c *progressConn) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.interrupted = true
	c.Conn.SetWriteDeadline(longAgo)
}

// abandon makes reads and writes fail, and ends the wait of hangUp.
func (c *progressConn) abandon() {
	c.interrupt()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.abandoned, c.wakeAt = true, longAgo
	c.Conn.SetReadDeadline(longAgo)
}

// hangUp sends FIN, waits for the relay's close, and closes the connection. It waits, because the relay counts the connection
// until it has closed its side. The wait ends after wait or maxDiscard octets.
func (c *progressConn) hangUp(wait time.Duration) {
	c.interrupt()
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if ok && wait > 0 && half.CloseWrite() == nil && c.listen(wait) {
		io.CopyN(io.Discard, c.Conn, maxDiscard)
	}
	c.Conn.Close()
}

// maxDiscard is how many octets hangUp reads and discards while it waits for the relay's close. A relay that sends more is
// flooding.
const maxDiscard = 1 << 20

func (c *progressConn) listen(wait time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.abandoned {
		c.Conn.SetReadDeadline(time.Now().Add(wait))
	}
	return !c.abandoned
}

// peerClosed are the errors of a read or a write on a connection that the relay has closed or reset.
var peerClosed = []error{
	io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe,
	syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE,
	// WSAECONNRESET and WSAECONNABORTED of Windows. On Windows, syscall.ECONNRESET is an invented number that no call returns.
	// No other system uses these numbers.
	syscall.Errno(10054), syscall.Errno(10053),
}

// ClosedByPeer reports whether err, from a read, means that the relay has closed the connection.
func ClosedByPeer(err error) bool {
	return slices.ContainsFunc(peerClosed, func(target error) bool { return errors.Is(err, target) })
}

// IsTimeout reports whether err is a timeout.
func IsTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// isOver reports whether err means that a deadline of ours has passed, and not that the kernel has aborted the connection.
func isOver(err error) bool { return IsTimeout(err) && !errors.Is(err, syscall.ETIMEDOUT) }

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// Explain adds to err, a network error, what it means.
func Explain(err error) error {
	switch {
	case err == nil:
		return nil
	case ClosedByPeer(err):
		return fmt.Errorf("connection lost: %w", err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return fmt.Errorf("connection lost, sent data is not acknowledged: %w", err)
	}
	return err
}
