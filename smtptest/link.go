package smtptest

import (
	"bufio"
	"encoding/binary"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// link is a client's connection below TLS. *netpipe.Conn is one.
type link interface {
	net.Conn
	CloseWrite() error // FIN
	Reset()            // RST; the link is closed then
	Unread() int       // octets that have arrived and were not read; may be 1 for any number, or 0 if the system cannot tell
}

var (
	_ link = (*netpipe.Conn)(nil)
	_ link = (*tcpLink)(nil)
	_ link = (*delayedLink)(nil)
)

// tcpLink is a link over a socket.
type tcpLink struct {
	*net.TCPConn
	raw syscall.RawConn
}

func newTCPLink(c *net.TCPConn) (*tcpLink, error) {
	raw, err := c.SyscallConn()
	return &tcpLink{c, raw}, err
}

func (l *tcpLink) Reset() {
	l.SetLinger(0)
	l.Close()
}

func (l *tcpLink) Unread() int { return peek(l.raw) }

// wire is a link with a read buffer: octets in the buffer, or unread in the link, have arrived. It counts turns: the times that
// the relay had answered, waited, and then received input.
type wire struct {
	link
	in    *bufio.Reader // over link
	delay time.Duration // the round-trip time of the link
	turns atomic.Int64  // written by the reader

	// owned by the connection's goroutine
	answered bool      // something was written since the last turn
	since    time.Time // when answered was set
	early    bool      // input had already arrived at the last write; used without a delay only
}

// Read counts a turn if the client can have waited for the relay's output before it sent what Read returns. With a delay, that is
// input that arrives no sooner than one round trip after the oldest output since the last turn. The oldest, not the latest: a
// client that overlaps its commands, and always gets a reply while the next command is in flight, still pays for the round trips
// that pass. Without a delay, it is input that had not arrived when the output was written.
func (w *wire) Read(p []byte) (int, error) {
	if w.in.Buffered() > 0 {
		return w.in.Read(p)
	}
	if w.early {
		w.early = w.link.Unread() > 0
	}
	early := w.early
	n, err := w.in.Read(p)
	if n > 0 && w.answered && !early && time.Since(w.since) >= w.delay {
		w.answered = false
		w.turns.Add(1)
	}
	return n, err
}

func (w *wire) Write(p []byte) (int, error) {
	if !w.answered {
		w.answered, w.since = true, time.Now()
	}
	w.early = w.delay == 0 && w.link.Unread() > 0
	return w.link.Write(p)
}

// Unread reports, as a number above 0, whether something has arrived that was not read.
func (w *wire) Unread() int {
	if n := w.in.Buffered(); n > 0 {
		return n
	}
	return w.link.Unread()
}

// records is a wire for crypto/tls to read from. It returns at most one record at a time, so that what has arrived stays in the
// wire, where it can be counted, and not in TLS's own buffer.
type records struct {
	*wire
	head []byte // the part of the record's header that was read
	left int    // octets of the record's body to come
}

func (r *records) Read(p []byte) (int, error) {
	const header = 5 // type, version, length
	if r.left > 0 {
		n, err := r.wire.Read(p[:min(len(p), r.left)])
		r.left -= n
		return n, err
	}
	n, err := r.wire.Read(p[:min(len(p), header-len(r.head))])
	if r.head = append(r.head, p[:n]...); len(r.head) == header {
		r.left = int(binary.BigEndian.Uint16(r.head[3:]))
		r.head = r.head[:0]
	}
	return n, err
}
