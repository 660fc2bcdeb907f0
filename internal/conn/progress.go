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

// progressConn is the network connection below TLS. A write to a relay that takes nothing, or less than leastRate, ends in
// time; a blocked write can be interrupted for good.
//
// What bounds writing is an allowance of time. Writing uses it up, and each octet written gives back its part at leastRate,
// up to limit. So a relay may take nothing for limit, and it cannot hold a writer by taking a little now and then.
type progressConn struct {
	net.Conn
	limit time.Duration // the most that the allowance can be; 0 means that nothing bounds a write
	spent time.Duration // of the allowance; owned by the writer

	socket syscall.RawConn // below; nil where there is none, and where nothing is to be set
	hasten bool            // the relay may be waiting for an acknowledgement; owned by the reader

	mu          sync.Mutex // guards the fields below, and that a deadline set before is not set again after
	interrupted bool
	abandoned   bool
}

// newProgressConn returns nc with writes bounded by limit, and has the kernel give it up after unacked without acknowledgement.
// For both 0 means no limit.
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

// setUnacked has the kernel give the connection up once what was sent has had no acknowledgement for so long; 0 means as long as the
// kernel likes.
func (c *progressConn) setUnacked(d time.Duration) {
	if c.socket != nil {
		c.socket.Control(func(fd uintptr) { SetUnacked(fd, d) })
	}
}

// Read implements io.Reader. Where the reader has set hasten, what was read before is acknowledged first: some relays write each
// reply on its own, and their kernel holds a reply back until the one before is acknowledged (RFC 896), which ours does after 40 ms
// where it has nothing to send.
func (c *progressConn) Read(p []byte) (int, error) {
	if c.hasten {
		c.hasten = false
		if c.socket != nil {
			c.socket.Control(acknowledge)
		}
	}
	return c.Conn.Read(p)
}

var errInterrupted = errors.New("write interrupted")

// leastRate is how many octets a second a relay must take on average, once Timeouts.Write is used up by slower writes. It is
// so low that it ends only what is meant to hold a writer: a slow message that is given up was in vain.
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
				continue // slow, but moving
			}
			err = fmt.Errorf("the relay takes less than %d octets a second: %w", leastRate, err)
		}
		return n, err
	}
}

func (c *progressConn) extend(deadline time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.interrupted {
		return false
	}
	if c.limit > 0 {
		c.Conn.SetWriteDeadline(deadline)
	}
	return true
}

// interrupt ends a write that is under way and every later one.
func (c *progressConn) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.interrupted = true
	c.Conn.SetWriteDeadline(longAgo)
}

// abandon ends writes, and the wait of hangUp.
func (c *progressConn) abandon() {
	c.interrupt()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.abandoned = true
	c.Conn.SetReadDeadline(longAgo)
}

// hangUp closes the connection after telling the relay, and waits until it has closed its side too, for wait and
// maxDiscard octets at most: only then does it count one connection less.
func (c *progressConn) hangUp(wait time.Duration) {
	c.interrupt()
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if ok && wait > 0 && half.CloseWrite() == nil && c.listen(wait) {
		io.CopyN(io.Discard, c.Conn, maxDiscard)
	}
	c.Conn.Close()
}

// maxDiscard is how many octets are read and thrown away while the relay's close is awaited. One that sends more is flooding.
const maxDiscard = 1 << 20

func (c *progressConn) listen(wait time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.abandoned {
		c.Conn.SetReadDeadline(time.Now().Add(wait))
	}
	return !c.abandoned
}

// peerClosed are the errors of a read, or of a write, on a connection that the relay has closed or reset.
var peerClosed = []error{
	io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe,
	syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE,
	// Windows reports these two as WSAECONNRESET and WSAECONNABORTED. Its syscall.ECONNRESET is a number of Go's own that no
	// call returns, and no other system has errors with these numbers.
	syscall.Errno(10054), syscall.Errno(10053),
}

// ClosedByPeer reports whether err, of a read, means that the relay has closed the connection.
func ClosedByPeer(err error) bool {
	return slices.ContainsFunc(peerClosed, func(target error) bool { return errors.Is(err, target) })
}

// IsTimeout reports whether err means that something took too long.
func IsTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// isOver reports whether err means that a deadline of ours has passed, and not that the kernel has given the connection up.
func isOver(err error) bool { return IsTimeout(err) && !errors.Is(err, syscall.ETIMEDOUT) }

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// Explain says of err, a fault of the connection, what it means.
func Explain(err error) error {
	switch {
	case err == nil:
		return nil
	case ClosedByPeer(err):
		return fmt.Errorf("connection lost: %w", err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return fmt.Errorf("connection lost, nothing is acknowledged any more: %w", err)
	}
	return err
}
