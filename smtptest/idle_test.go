// Faults at Idle, which strike when the client sends nothing.

package smtptest

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestIdleFault(t *testing.T) {
	timeout := Fault{At: Idle, Delay: 10 * time.Second, Reply: "421 4.4.2 timeout", Drop: true}
	t.Run("strikes when the client is silent", func(t *testing.T) {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			s.Fault(timeout)
			r := open(t, s)
			time.Sleep(9 * time.Second)
			r.send("a@x.example", "b@y.example", "text") // in time, and restarts the wait
			before := time.Now()
			r.want("421 4.4.2 timeout")
			r.closed()
			if took := time.Since(before); took != 10*time.Second {
				t.Errorf("after %v", took)
			}
		})
	})
	t.Run("not in a transaction", func(t *testing.T) {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			h := s.Fault(timeout)
			r := open(t, s)
			r.say("MAIL FROM:<a@x.example>")
			r.want("250 ")
			time.Sleep(time.Hour)
			r.silent()
			if h.Hits() != 0 {
				t.Error("the fault struck")
			}
			r.say("RSET")
			r.want("250 ")
			time.Sleep(time.Hour)
			r.want("421 ")
		})
	})
	t.Run("once, with several idle connections", func(t *testing.T) {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			h := s.Fault(timeout)
			r1, r2 := open(t, s), open(t, s)
			time.Sleep(time.Hour)
			synctest.Wait()
			if h.Hits() != 1 || s.Stats().Open != 1 {
				t.Errorf("%d hits, %d open", h.Hits(), s.Stats().Open)
			}
			r1.Close()
			r2.Close()
		})
	})
	t.Run("strikes a connection that is already idle", func(t *testing.T) {
		s := NewUnstartedServer()
		bubble(t, s, func(t *testing.T) {
			r := open(t, s)
			time.Sleep(time.Minute)
			s.Fault(Fault{At: Idle, When: func(e Event) bool { return e.Conn == 7 }, Drop: true})
			s.Fault(Fault{At: Idle, Reply: "451 4.4.2 Timeout - closing connection", Drop: true})
			r.want("451 4.4.2 Timeout")
			r.closed()
		})
	})
	t.Run("a reply that does not close", func(t *testing.T) {
		s := NewUnstartedServer()
		bubble(t, s, func(t *testing.T) {
			r := open(t, s)
			s.Fault(Fault{At: Idle, Delay: time.Minute, Reply: "250 unasked"})
			r.want("250 unasked")
			r.send("a@x.example", "b@y.example", "text") // TLS survives the interrupted read
		})
	})
}
