package smtprelay

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// progressConn is the network connection below TLS. Its write deadline moves with progress, so that a relay which takes
// nothing ends a write and one which is slow does not; and a blocked write can be interrupted for good.
type progressConn struct {
	net.Conn
	limit time.Duration // without progress; 0 means none

	mu          sync.Mutex // guards the fields below, and that a deadline set before is not set again after
	interrupted bool
	abandoned   bool
}

var errInterrupted = errors.New("write interrupted")

// Write implements io.Writer.
func (c *progressConn) Write(p []byte) (n int, err error) {
	for {
		if !c.extend() {
			return n, errInterrupted
		}
		var k int
		k, err = c.Conn.Write(p[n:])
		n += k
		if k > 0 && n < len(p) && errors.Is(err, os.ErrDeadlineExceeded) {
			continue // slow, but moving
		}
		return n, err
	}
}

func (c *progressConn) extend() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.interrupted {
		return false
	}
	if c.limit > 0 {
		c.Conn.SetWriteDeadline(time.Now().Add(c.limit))
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

// hangUp closes the connection after telling the relay, and waits until it has closed its side too, for wait at most: only
// then does it count one connection less.
func (c *progressConn) hangUp(wait time.Duration) {
	c.interrupt()
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if ok && wait > 0 && half.CloseWrite() == nil && c.listen(wait) {
		io.Copy(io.Discard, c.Conn)
	}
	c.Conn.Close()
}

func (c *progressConn) listen(wait time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.abandoned {
		c.Conn.SetReadDeadline(time.Now().Add(wait))
	}
	return !c.abandoned
}

// closedByPeer reports whether err, of a read, means that the relay has closed the connection.
func closedByPeer(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, io.ErrClosedPipe) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)
