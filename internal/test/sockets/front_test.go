package sockets

import (
	"io"
	"math"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"
)

// In front of a relay: a listener that counts connections, and a proxy that breaks them.

func listen(t testing.TB) *net.TCPListener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l.(*net.TCPListener)
}

// counter is a listener that counts the clients connected at once. A connection counts until this side has ended it, even if only
// with FIN: the client cannot see more, and need not wait until its data is read.
type counter struct {
	*net.TCPListener
	most      int  // the allowed number; see exceeded
	impatient bool // the client waits so briefly for the relay to close that it may have given up: a connection that it has closed does not count

	mu       sync.Mutex // guards the fields below
	open     map[*counted]struct{}
	exceeded int // the most that were open at once, if more than allowed
}

type counted struct {
	*net.TCPConn
	c *counter
}

// connState is the state of a connection as seen from this side.
type connState int

const (
	over        connState = iota // this side has sent FIN, or either side RST
	halfClosed                   // the client has sent FIN, this side has not
	established                  // neither has
)

func count(l *net.TCPListener, s setup) *counter {
	return &counter{TCPListener: l, most: s.maxConns, impatient: s.forgets(), open: map[*counted]struct{}{}}
}

func (c *counter) Accept() (net.Conn, error) {
	conn, err := c.AcceptTCP()
	if err != nil {
		return nil, err
	}
	cc := &counted{conn, c}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[cc] = struct{}{}
	for try := 0; len(c.open) > c.most; try++ {
		n := 0
		for o := range c.open {
			if s := tcpState(o.TCPConn); s == established || s == halfClosed && !c.impatient {
				n++
			}
		}
		if n <= c.most {
			break
		}
		if try == 100 { // time for the system to handle a RST
			c.exceeded = max(c.exceeded, n)
			break
		}
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	return cc, nil
}

func (c *counted) Close() error {
	c.c.mu.Lock()
	delete(c.c.open, c)
	c.c.mu.Unlock()
	return c.TCPConn.Close()
}

// proxy forwards octets between clients and a relay, and breaks connections.
type proxy struct {
	in      *counter
	to      string
	weather weather
	over    chan struct{}
	running sync.WaitGroup
}

// weather says how many connections in a hundred the proxy breaks and delays.
type weather struct {
	seed          uint64
	breaks, holds int
}

func newProxy(in *counter, to string, w weather) *proxy {
	p := &proxy{in: in, to: to, weather: w, over: make(chan struct{})}
	p.running.Go(func() {
		for n := uint64(0); ; n++ {
			c, err := in.Accept()
			if err != nil {
				return
			}
			p.running.Go(func() { p.serve(c.(*counted), rand.New(rand.NewPCG(w.seed, n))) })
		}
	})
	return p
}

// close ends the proxy once all clients have disconnected.
func (p *proxy) close() {
	p.in.Close()
	close(p.over)
	p.running.Wait()
}

// flow is one direction of a connection.
type flow struct {
	src, dst *net.TCPConn
	octets   int // the number of octets after which it acts
	happens  event
	hold     time.Duration
}

type event int

const (
	nothing   event = iota
	pause           // for some milliseconds
	resetBoth       // RST to both sides
	resetSrc        // RST to the writer, FIN to the reader
	resetDst
	endDst // FIN to the reader, whose own data still passes
	endBoth
	events
)

func (p *proxy) serve(client *counted, rng *rand.Rand) {
	defer client.Close()
	conn, err := net.Dial("tcp", p.to)
	if err != nil {
		reset(client.TCPConn)
		return
	}
	relay := conn.(*net.TCPConn)
	defer relay.Close()
	up, down := flow{src: client.TCPConn, dst: relay}, flow{src: relay, dst: client.TCPConn}
	f, most := &up, 2e6 // about the most that a connection carries
	if rng.IntN(3) == 0 {
		f, most = &down, 5e3
	}
	f.octets = int(math.Pow(most, rng.Float64()))
	switch n := rng.IntN(100); {
	case n < p.weather.breaks:
		f.happens = resetBoth + event(rng.IntN(int(events-resetBoth)))
	case n < p.weather.breaks+p.weather.holds:
		f.happens, f.hold = pause, time.Duration(rng.IntN(8_000))*time.Microsecond
	}
	var both sync.WaitGroup
	both.Go(func() { p.pass(up) })
	both.Go(func() { p.pass(down) })
	both.Wait()
}

// pass copies one direction until its end, and forwards the end as it came.
func (p *proxy) pass(f flow) {
	if f.happens != nothing {
		if _, err := io.CopyN(f.dst, f.src, int64(f.octets)); err == nil && !p.strike(f) {
			io.Copy(io.Discard, f.src)
			return
		}
	}
	_, err := io.Copy(f.dst, f.src)
	if err == nil {
		f.dst.CloseWrite()
		return
	}
	reset(f.src)
	reset(f.dst)
}

// strike breaks or delays the flow, and reports whether it continues.
func (p *proxy) strike(f flow) bool {
	switch f.happens {
	case pause:
		select {
		case <-time.After(f.hold):
		case <-p.over:
		}
		return true
	case resetBoth:
		reset(f.src)
		reset(f.dst)
	case resetSrc:
		f.dst.CloseWrite()
		reset(f.src)
	case resetDst:
		reset(f.dst)
		f.src.CloseWrite()
	case endDst:
		f.dst.CloseWrite()
	case endBoth:
		f.dst.CloseWrite()
		f.src.CloseWrite()
	}
	return false
}

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}
