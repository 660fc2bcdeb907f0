package smtptest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/internal/netpipe"
)

func listen() net.Listener {
	addr := "127.0.0.1:0"
	if serveFlag != "" {
		addr = serveFlag
	}
	l, err := net.Listen("tcp", addr)
	if err != nil && serveFlag == "" {
		l, err = net.Listen("tcp6", "[::1]:0")
	}
	if err != nil {
		panic(fmt.Sprintf("smtptest: cannot listen: %v", err))
	}
	return l
}

// accept runs until Close. An error such as too many open files passes: it tries again after a pause that grows, as net/http
// does.
func (s *Server) accept() {
	var pause time.Duration
	for {
		nc, err := s.listener.Accept()
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
		s.serve(l, time.Now().Add(s.Delay))
	}
}

// Dial opens a connection to the relay, whatever network and addr say. It has the type of [smtprelay.Config].Dial.
func (s *Server) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if !s.InMemory {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", s.addr)
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
	if !s.serve(relay, time.Now()) {
		return nil, &net.OpError{Op: "dial", Net: "pipe", Err: syscall.ECONNREFUSED}
	}
	return client, nil
}

// serve starts the relay's side of a connection that has come about at the client's end at opened. It reports false, and
// closes l, if the relay is closed.
func (s *Server) serve(l link, opened time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		l.Close()
		return false
	}
	if s.Delay > 0 {
		l = delayed(l, s.Delay, opened, s.Buffer, &s.wg)
	}
	c := newConn(s, l, len(s.conns)+1)
	s.conns = append(s.conns, c)
	s.wg.Go(func() { c.run(opened) }) // until either side closes; Close cuts it if it must
	return true
}
