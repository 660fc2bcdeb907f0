package smtptest

import (
	"context"
	"fmt"
	"log"
	"strings"
	"time"
)

// CloseClientConnections closes all open connections at once, without a reply, like a relay that restarts. The relay still accepts
// connections, and keeps its messages. It is safe for concurrent use.
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

// Close ends the relay. Clients may be closed before or after it: Close does not wait for an idle client.
//
// Close sends 421 to an idle connection and closes it at once. A connection is idle outside a transaction, and in a transaction
// in which something was refused, since the client may have abandoned it. In any other transaction Close waits 200 ms and one
// Delay for the next command; and it waits for a body, a chunk, AUTH or a TLS handshake in progress. After five seconds it logs
// which connections hang, and where, and cuts them. It cuts a connection that a Fault has stalled at once. After the 421, the
// client has 50 ms and one Delay to close its side.
//
// When Close returns, no goroutine of the relay is left, and its counters and messages are still available. Calling Close again, or
// before Start, does nothing.
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
	for _, l := range s.listeners {
		l.Close()
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
	s.removeCA()
	s.backends.Close() // go-smtp knows of the listener only once Serve has run
	s.backend.Shutdown(context.Background())
	<-s.served
}

// cutAll cuts the remaining connections, and logs them.
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
