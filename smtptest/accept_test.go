// The loop that accepts connections, on a listener that fails.

package smtptest

import (
	"bufio"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// failing is a listener that fails with EMFILE before it accepts, or until it is closed.
type failing struct {
	net.Listener
	times  int // negative means for ever
	failed []time.Time
	closed chan struct{}
}

func (l *failing) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
	}
	if l.times == 0 {
		return l.Listener.Accept()
	}
	l.times--
	l.failed = append(l.failed, time.Now())
	return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
}

func (l *failing) Close() error {
	close(l.closed)
	if l.Listener != nil {
		return l.Listener.Close()
	}
	return nil
}

func TestAcceptSurvivesErrors(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := plainRelay()
	s.InMemory = true // no listener of its own
	start(t, s)
	l := &failing{Listener: tcp, times: 3, closed: make(chan struct{})}
	s.listeners = []net.Listener{l}
	s.wg.Go(func() { s.accept(l, 1) })
	nc, err := net.Dial("tcp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	r := &raw{t: t, Conn: nc, br: bufio.NewReader(nc)}
	t.Cleanup(func() { nc.Close() })
	r.ready(s)
	r.send("a@x.example", "b@y.example", "text")
	if len(l.failed) != 3 {
		t.Errorf("failed %d times", len(l.failed))
	}
}

func TestAcceptPausesLongerEachTime(t *testing.T) {
	s := plainRelay()
	l := &failing{times: -1, closed: make(chan struct{})}
	synctest.Test(t, func(t *testing.T) {
		s.InMemory = true
		s.Start()
		l.closed = make(chan struct{})
		s.listeners = []net.Listener{l}
		s.wg.Go(func() { s.accept(l, 1) })
		time.Sleep(10 * time.Second)
		began := time.Now()
		s.Close()
		if took := time.Since(began); took != 0 {
			t.Errorf("Close took %v", took)
		}
	})
	want := 5 * time.Millisecond
	for i := range len(l.failed) - 1 {
		if got := l.failed[i+1].Sub(l.failed[i]); got != want {
			t.Errorf("pause %d: %v, want %v", i+1, got, want)
		}
		want = min(2*want, time.Second)
	}
	if n := len(l.failed); n != 17 { // 8 pauses in 1.275 s, then one a second
		t.Errorf("failed %d times in 10 s", n)
	}
}
