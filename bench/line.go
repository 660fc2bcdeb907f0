// The delay line: gives a loopback connection the round-trip time of a long one, and counts its round trips.

package main

import (
	"io"
	"net"
	"sync"
	"time"
)

// maxUnderWay is how many octets one direction of a line holds before it stops reading: far more than a body, so the line adds
// latency but does not limit bandwidth.
const maxUnderWay = 64 << 20

// sleeper is an alarm, or a test's replacement for it.
type sleeper interface {
	waitUntil(time.Time)
	close()
}

// A line is the relay's end of a connection that delays octets by half a round trip in each direction. It is below TLS.
//
// It behaves like TCP: the relay has the connection one and a half round trips after the client has begun to dial (SYN, SYN-ACK,
// ACK), nothing that the client writes leaves before the SYN-ACK could have arrived, and a close is delayed like everything else.
// It has no bandwidth limit, no window and no loss.
//
// The line also counts turns, by cause and not by reads: a piece that the client sent after a reply of turn n had been delivered
// belongs to turn n+1, and the relay's output belongs to the turn of the input before it. So a connection's count is the length
// of its longest chain of waits, however the octets are split into segments; messages in flight together share a turn. Connecting
// is turns 1 (the SYN) and 2 (the ACK, or a ClientHello with it).
type line struct {
	conn        net.Conn // to the client; closed by deliver, or by kill
	half        time.Duration
	established time.Time // when the relay has the connection
	reading     sleeper   // owned by Read
	writing     sleeper   // owned by deliver
	drained     chan struct{}
	over        chan struct{} // closed when both goroutines are done

	mu        sync.Mutex // guards the fields below
	changed   sync.Cond
	in        []piece
	inSize    int
	out       []piece
	closed    bool // the relay has closed its side
	turn      int
	delivered []delivery // replies that the client has, oldest first, after which no piece was read yet
}

// piece is a run of octets in flight.
type piece struct {
	data []byte
	at   time.Time // in: when the client sent it; out: when it reaches the client
	turn int       // out: the turn of what the relay had read when it wrote this
	eof  bool
}

type delivery struct {
	at   time.Time
	turn int
}

// newLine puts a line with this round-trip time on a connection that was just accepted.
func newLine(conn net.Conn, rtt time.Duration, newSleeper func() sleeper) *line {
	now := time.Now()
	l := &line{
		conn:        conn,
		half:        rtt / 2,
		established: now.Add(rtt + rtt/2),
		reading:     newSleeper(),
		writing:     newSleeper(),
		drained:     make(chan struct{}),
		over:        make(chan struct{}),
		turn:        2,
	}
	l.changed.L = &l.mu
	go l.collect() // ends when the client has closed, or by kill
	go l.deliver() // ends when the relay has closed, or by kill
	return l
}

// accepted waits until the relay would have the connection.
func (l *line) accepted() { l.reading.waitUntil(l.established) }

// collect reads what the client sends, even after the relay has closed: closing with unread octets would reset the connection and
// destroy the last replies.
func (l *line) collect() {
	defer close(l.drained)
	earliest := l.established.Add(-l.half)
	buf := make([]byte, 64<<10)
	for {
		n, err := l.conn.Read(buf)
		now := time.Now()
		if now.Before(earliest) {
			now = earliest
		}
		l.mu.Lock()
		for l.inSize > maxUnderWay && !l.closed {
			l.changed.Wait()
		}
		if n > 0 && !l.closed {
			l.in = append(l.in, piece{data: append([]byte(nil), buf[:n]...), at: now})
			l.inSize += n
		}
		if err != nil {
			l.in = append(l.in, piece{at: now, eof: true})
		}
		l.changed.Broadcast()
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Read returns octets that have arrived. Only one goroutine may read.
func (l *line) Read(p []byte) (int, error) {
	l.mu.Lock()
	for len(l.in) == 0 && !l.closed {
		l.changed.Wait()
	}
	if l.closed {
		l.mu.Unlock()
		return 0, net.ErrClosed
	}
	due := l.in[0].at.Add(l.half)
	l.mu.Unlock()
	l.reading.waitUntil(due)

	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	n := 0
	for n < len(p) && len(l.in) > 0 {
		first := &l.in[0]
		if n > 0 && first.at.Add(l.half).After(now) {
			break
		}
		if first.eof {
			if n == 0 {
				return 0, io.EOF
			}
			break
		}
		for len(l.delivered) > 0 && !l.delivered[0].at.After(first.at) {
			l.turn = max(l.turn, l.delivered[0].turn+1)
			l.delivered = l.delivered[1:]
		}
		m := copy(p[n:], first.data)
		n += m
		l.inSize -= m
		if first.data = first.data[m:]; len(first.data) == 0 {
			l.in = l.in[1:]
		}
	}
	l.changed.Broadcast()
	return n, nil
}

// Write queues p for the client and does not wait.
func (l *line) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, net.ErrClosed
	}
	l.out = append(l.out, piece{data: append([]byte(nil), p...), at: time.Now().Add(l.half), turn: l.turn})
	l.changed.Broadcast()
	return len(p), nil
}

// Close closes the relay's side: the client learns of it half a round trip later.
func (l *line) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		l.out = append(l.out, piece{at: time.Now().Add(l.half), eof: true})
		l.changed.Broadcast()
	}
	return nil
}

// deliver writes to the client what has been delayed long enough.
func (l *line) deliver() {
	defer close(l.over)
	defer l.writing.close()
	defer l.reading.close()
	for {
		l.mu.Lock()
		for len(l.out) == 0 {
			l.changed.Wait()
		}
		next := l.out[0]
		l.out = l.out[1:]
		l.mu.Unlock()

		l.writing.waitUntil(next.at)
		if next.eof {
			closeGently(l.conn, l.drained)
			return
		}
		// Noted before the write: the client may answer before Write returns.
		l.mu.Lock()
		l.delivered = append(l.delivered, delivery{at: time.Now(), turn: next.turn})
		l.mu.Unlock()
		l.conn.Write(next.data)
	}
}

// closeGently closes the sending side, waits a while for the client to close its side, and closes.
func closeGently(conn net.Conn, drained <-chan struct{}) {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
	patience := time.NewTimer(2 * time.Second)
	defer patience.Stop()
	select {
	case <-drained:
	case <-patience.C:
	}
	conn.Close()
}

// turns returns the turn of the last octets read.
func (l *line) turns() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.turn
}

// kill ends the connection at once.
func (l *line) kill() {
	l.conn.Close()
	l.Close()
}

func (l *line) LocalAddr() net.Addr              { return l.conn.LocalAddr() }
func (l *line) RemoteAddr() net.Addr             { return l.conn.RemoteAddr() }
func (l *line) SetDeadline(time.Time) error      { return nil }
func (l *line) SetReadDeadline(time.Time) error  { return nil }
func (l *line) SetWriteDeadline(time.Time) error { return nil }
