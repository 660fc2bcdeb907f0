package smtptest

import (
	"context"
	"fmt"
	"log"
	"strings"
	"time"
)

// CloseClientConnections closes all open connections at once, without a word, as a relay does that is restarted.
func (s *Server) CloseClientConnections() {
	s.mu.Lock()
	var open []*conn
	for _, c := range s.conns {
		if c.stats.Open {
			open = append(open, c)
		}
	}
	s.mu.Unlock()
	for _, c := range open {
		c.abandon()
	}
}

// Close ends the relay. Connections outside a transaction are told 421 and closed, and so are those in one whose client says
// nothing for 200 ms and one Delay. A client that is in the midst of a body, a chunk, AUTH or a TLS handshake is waited for.
// After five seconds Close logs which connections hang, and where, and cuts them. A connection that a Fault has stalled is
// cut at once. When Close returns no goroutine of the relay is left. Calling it again does nothing.
func (s *Server) Close() {
	if !s.started {
		return
	}
	s.mu.Lock()
	if !s.closing {
		s.closing, s.closedAt = true, time.Now()
		close(s.done)
		for _, c := range s.conns {
			c.wakeLocked()
		}
	}
	s.mu.Unlock()
	if s.listener != nil {
		s.listener.Close()
	}

	ended := make(chan struct{})
	go func() { // ends when all connections have
		s.wg.Wait()
		close(ended)
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
		s.cutAll()
		<-ended
	}
	s.backends.Close() // go-smtp knows of the listener only once Serve has run
	s.backend.Shutdown(context.Background())
	<-s.served
}

// cutAll ends the connections that are left, and tells which.
func (s *Server) cutAll() {
	var b strings.Builder
	s.mu.Lock()
	var left []*conn
	for _, c := range s.conns {
		if !c.over {
			left = append(left, c)
			fmt.Fprintf(&b, "\n  %d from %s: %s", c.stats.Conn, c.wire.RemoteAddr(), c.whereLocked())
		}
	}
	s.mu.Unlock()
	if len(left) > 0 {
		log.Printf("smtptest.Server blocked in Close after %v, cutting connections:%s", patience, &b)
	}
	for _, c := range left {
		c.abandon()
	}
}
