// Package netpipe provides in-memory network connections that behave like TCP: each direction has a buffer, so that a write
// returns before the peer has read it, each side can be closed for writing alone or reset, and deadlines work. Everything in it
// blocks durably, so it may be used inside a testing/synctest bubble (net.Pipe has no buffer, which hides both pipelining and
// deadlocks between two writers).
package netpipe

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// DefaultBuffer is the default capacity of each direction, similar to that of a TCP socket.
const DefaultBuffer = 64 << 10

// New returns the two ends of a connection whose directions hold buffer bytes each; 0 means DefaultBuffer.
func New(buffer int) (client, server *Conn) {
	if buffer <= 0 {
		buffer = DefaultBuffer
	}
	up, down := newHalf(buffer), newHalf(buffer)
	return &Conn{in: down, out: up, local: "client", remote: "server"},
		&Conn{in: up, out: down, local: "server", remote: "client"}
}

// Conn is one end of a connection. It is safe for concurrent use.
type Conn struct {
	in, out       *half
	local, remote addr
}

var _ net.Conn = (*Conn)(nil)

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.in.read(p)
	return n, c.wrap("read", err)
}

// Write implements net.Conn. Like a socket's, it returns once the bytes are in the buffer.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.out.write(p)
	return n, c.wrap("write", err)
}

// CloseWrite lets the peer read what was written and then io.EOF, as a TCP FIN does.
func (c *Conn) CloseWrite() error {
	c.out.finish()
	return nil
}

// Close closes both directions. As with TCP, unread input turns it into a reset.
func (c *Conn) Close() error {
	if c.in.abandon() > 0 {
		c.out.reset()
	} else {
		c.out.finish()
	}
	c.out.closeWriter()
	return nil
}

// Reset closes both directions at once and destroys the data in flight in both, as a TCP RST does.
func (c *Conn) Reset() {
	c.in.abandon()
	c.out.reset()
	c.out.closeWriter()
}

// SetLinger implements the method of *net.TCPConn: with sec 0 it resets the connection.
func (c *Conn) SetLinger(sec int) error {
	if sec == 0 {
		c.Reset()
	}
	return nil
}

func (c *Conn) LocalAddr() net.Addr  { return c.local }
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

func (c *Conn) SetDeadline(t time.Time) error {
	c.in.setReadDeadline(t)
	c.out.setWriteDeadline(t)
	return nil
}

func (c *Conn) SetReadDeadline(t time.Time) error  { c.in.setReadDeadline(t); return nil }
func (c *Conn) SetWriteDeadline(t time.Time) error { c.out.setWriteDeadline(t); return nil }

// Unread returns how many bytes the peer has written that this end has not read.
func (c *Conn) Unread() int {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	return c.in.unreadLocked()
}

func (c *Conn) wrap(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "pipe", Source: c.local, Addr: c.remote, Err: err}
}

type addr string

func (addr) Network() string  { return "pipe" }
func (a addr) String() string { return string(a) }

// half is one direction: what one end writes and the other reads.
type half struct {
	mu         sync.Mutex // guards the fields below
	changed    *sync.Cond // on mu: any field has changed
	buf        []byte     // buf[off:] is in flight
	off        int
	max        int
	finished   bool // the writer has closed: the reader gets io.EOF after buf
	broken     bool // reset by the writer's end: the reader gets ECONNRESET at once
	readerGone bool // writes fail with EPIPE, reads with net.ErrClosed
	writerGone bool // writes fail with net.ErrClosed
	reading    deadline
	writing    deadline
}

// deadline is the time after which one side of a half no longer waits.
type deadline struct {
	at      time.Time // zero means none
	expired bool
	timer   *time.Timer // sets expired; reused
}

func newHalf(max int) *half {
	h := &half{max: max}
	h.changed = sync.NewCond(&h.mu)
	return h
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.readerGone:
			return 0, net.ErrClosed
		case h.broken:
			return 0, syscall.ECONNRESET
		case h.reading.expired:
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case h.unreadLocked() > 0:
			n := copy(p, h.buf[h.off:])
			if h.off += n; h.off == len(h.buf) {
				h.buf, h.off = h.buf[:0], 0
			}
			h.changed.Broadcast()
			return n, nil
		case h.finished:
			return 0, io.EOF
		}
		h.changed.Wait()
	}
}

func (h *half) write(p []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.writerGone:
			return n, net.ErrClosed
		case h.readerGone, h.finished:
			return n, syscall.EPIPE
		case h.writing.expired:
			return n, os.ErrDeadlineExceeded
		case len(p) == 0:
			return n, nil
		}
		if room := h.max - h.unreadLocked(); room > 0 {
			k := min(room, len(p))
			if len(h.buf)+k > cap(h.buf) && h.off > 0 { // move the unread bytes to the front before growing
				h.buf, h.off = h.buf[:copy(h.buf, h.buf[h.off:])], 0
			}
			h.buf = append(h.buf, p[:k]...)
			p, n = p[k:], n+k
			h.changed.Broadcast()
			continue
		}
		h.changed.Wait()
	}
}

func (h *half) unreadLocked() int { return len(h.buf) - h.off }

func (h *half) update(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	h.changed.Broadcast()
}

func (h *half) finish()      { h.update(func() { h.finished = true }) }
func (h *half) reset()       { h.update(func() { h.broken, h.finished, h.buf, h.off = true, true, nil, 0 }) }
func (h *half) closeWriter() { h.update(func() { h.writerGone = true; h.writing.stop() }) }

// abandon ends reading and returns the number of unread bytes.
func (h *half) abandon() (unread int) {
	h.update(func() {
		unread = h.unreadLocked()
		h.readerGone, h.buf, h.off = true, nil, 0
		h.reading.stop()
	})
	return unread
}

func (h *half) setReadDeadline(t time.Time)  { h.setDeadline(&h.reading, t) }
func (h *half) setWriteDeadline(t time.Time) { h.setDeadline(&h.writing, t) }

func (h *half) setDeadline(d *deadline, t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d.at = t
	if was := d.expired; d.set() != was {
		h.changed.Broadcast()
	}
	switch {
	case d.expired || t.IsZero():
		d.stop()
	case d.timer == nil:
		d.timer = time.AfterFunc(time.Until(t), func() {
			h.update(func() { d.set() })
		})
	default:
		d.timer.Reset(time.Until(t))
	}
}

// set updates and returns d.expired.
func (d *deadline) set() bool {
	d.expired = !d.at.IsZero() && !time.Now().Before(d.at)
	return d.expired
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}

// Listener accepts the connections that Dial makes. It implements net.Listener.
type Listener struct {
	buffer   int
	accepted chan *Conn
	closed   chan struct{}
	once     sync.Once
}

// Listen returns a Listener whose connections hold buffer bytes in each direction; 0 means DefaultBuffer.
func Listen(buffer int) *Listener {
	return &Listener{buffer: buffer, accepted: make(chan *Conn, 128), closed: make(chan struct{})}
}

// Dial makes a connection and returns its client end, or ECONNREFUSED once the listener is closed.
func (l *Listener) Dial() (*Conn, error) {
	client, server := New(l.buffer)
	refused := &net.OpError{Op: "dial", Net: "pipe", Err: syscall.ECONNREFUSED}
	select {
	case <-l.closed:
		return nil, refused
	default:
	}
	select {
	case l.accepted <- server:
		select {
		case <-l.closed: // Close may have reset the unaccepted connections before this one was added
			l.resetUnaccepted()
		default:
		}
		return client, nil
	case <-l.closed:
		return nil, refused
	}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. It resets connections that were not accepted.
func (l *Listener) Close() error {
	err := errors.New("netpipe: listener closed twice")
	l.once.Do(func() {
		close(l.closed)
		err = nil
	})
	l.resetUnaccepted()
	return err
}

func (l *Listener) resetUnaccepted() {
	for {
		select {
		case c := <-l.accepted:
			c.Reset()
		default:
			return
		}
	}
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return addr("listener") }
