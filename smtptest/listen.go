package smtptest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// loopback returns the nth address of the loopback network, counted from 0.
func loopback(n int) string {
	return netip.AddrFrom4([4]byte{127, 0, byte((n + 1) >> 8), byte(n + 1)}).String()
}

// listen opens a listener for each address, all with the same port.
func (s *Server) listen() {
	if s.Listener != nil {
		s.listeners, s.Addresses = []net.Listener{s.Listener}, 1
		return
	}
	first := net.JoinHostPort(loopback(0), "0")
	if serveFlag != "" {
		first, s.Addresses = serveFlag, 1
	}
	var err error
	for range 10 { // until a port is free on all addresses
		if err = s.listenFrom(first); err == nil {
			return
		}
	}
	panic(fmt.Sprintf("smtptest: cannot listen: %v", err))
}

func (s *Server) listenFrom(first string) error {
	s.listeners = nil
	l, err := net.Listen("tcp", first)
	if err != nil && serveFlag == "" && s.Addresses == 1 {
		l, err = net.Listen("tcp6", "[::1]:0")
	}
	if err != nil {
		return err
	}
	s.listeners = append(s.listeners, l)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for n := 1; n < s.Addresses; n++ {
		l, err := net.Listen("tcp", net.JoinHostPort(loopback(n), port))
		if err != nil {
			for _, l := range s.listeners {
				l.Close()
			}
			return err
		}
		s.listeners = append(s.listeners, l)
	}
	return nil
}

// accept serves the connections to the address addr, 1-based, until Close. After an error, such as too many open files, it tries
// again after a growing pause, as net/http does.
func (s *Server) accept(listener net.Listener, addr int) {
	var pause time.Duration
	for {
		nc, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(pause):
			case <-s.done:
				return
			}
			continue
		}
		pause = 0
		tc := nc.(*net.TCPConn)
		if s.Buffer > 0 {
			tc.SetReadBuffer(s.Buffer)
			tc.SetWriteBuffer(s.Buffer)
		}
		l, err := newTCPLink(tc)
		if err != nil {
			tc.Close()
			continue
		}
		s.serve(l, addr, time.Now().Add(s.Delay))
	}
}

// Dial opens a connection to the relay: to the address whose host addr has, or to the first if addr has any other host. It takes
// one Delay, ends with ctx, and is refused once the relay is closed. It has the type of [smtprelay.Config].Dial, is safe for
// concurrent use, and panics before Start.
func (s *Server) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	s.Addr() // panics before Start
	if !s.InMemory {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", s.addrs[s.node(addr)])
	}
	if s.Delay > 0 { // SYN and its acknowledgement
		t := time.NewTimer(s.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, &net.OpError{Op: "dial", Net: "pipe", Err: ctx.Err()}
		}
	}
	if ctx.Err() != nil {
		return nil, &net.OpError{Op: "dial", Net: "pipe", Err: ctx.Err()}
	}
	client, relay := netpipe.New(s.Buffer)
	if !s.serve(relay, s.node(addr)+1, time.Now()) {
		return nil, &net.OpError{Op: "dial", Net: "pipe", Err: syscall.ECONNREFUSED}
	}
	return client, nil
}

// node returns the index in s.addrs of the address with addr's host, or 0.
func (s *Server) node(addr string) int {
	host, _, _ := net.SplitHostPort(addr)
	for n := range s.addrs {
		if own, _, _ := net.SplitHostPort(s.addrs[n]); own == host {
			return n
		}
	}
	return 0
}

// serve starts the relay's side of a connection that the client sees as established at opened. It reports false, and closes l, if
// the relay is closed.
func (s *Server) serve(l link, addr int, opened time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		l.Close()
		return false
	}
	if s.Delay > 0 {
		l = delayed(l, s.Delay, opened, s.Buffer, &s.wg)
	}
	c := newConn(s, l, s.opened+1, addr)
	s.opened++
	s.conns = append(s.conns, c)
	s.wg.Go(func() { c.run(opened) }) // ends when either side closes; Close cuts it if it must
	return true
}
