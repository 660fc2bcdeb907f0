// A Delay at each step of a whole session.

package smtptest

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// wholeSession runs a session that passes every step but Idle: STARTTLS, LOGIN with its two challenges, a message by DATA, one in
// chunks with an empty last chunk, and one that is only an empty last chunk. Each command waits for its reply.
func wholeSession(t *testing.T, s *Server) {
	t.Helper()
	r := dial(t, s)
	r.want("220 ")
	each := func(says ...string) {
		t.Helper()
		for _, say := range says {
			r.say(say)
			if reply, err := r.reply(); err != nil || !positive(reply) {
				t.Fatalf("%.10s: %q, %v", say, reply, err)
			}
		}
	}
	each("EHLO client.test", "STARTTLS")
	r.tls(clientTLS(s))
	each("EHLO client.test", "AUTH LOGIN", base64Of(s.Username), base64Of(s.Password), "NOOP", "VRFY a")
	each("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA", "0123456789\r\n0123456789\r\n.", "RSET")
	each("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 12\r\n0123456789", "BDAT 12\r\n0123456789", "BDAT 0 LAST")
	each("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 0 LAST", "QUIT")
	r.closed()
}

func TestPauseAtEachStep(t *testing.T) {
	tests := []struct {
		f    Fault
		hits int
	}{
		{Fault{At: Connect}, 1},
		{Fault{At: EHLO}, 2},
		{Fault{At: StartTLS}, 1},
		{Fault{At: TLSHandshake}, 1},
		{Fault{At: Auth}, 1},
		{Fault{At: AuthResponse}, 2},
		{Fault{At: Mail}, 3},
		{Fault{At: Rcpt}, 3},
		{Fault{At: Data}, 1},
		{Fault{At: Body}, 2},
		{Fault{At: Body, AfterBytes: 13}, 2}, // in the middle of the body; with BDAT, in the second chunk
		{Fault{At: FinalDot}, 3},
		{Fault{At: Accepted}, 3},
		{Fault{At: Bdat}, 4},
		{Fault{At: Bdat, AfterBytes: 24}, 1}, // the empty last chunk, after the whole body
		{Fault{At: Rset}, 1},
		{Fault{At: Noop}, 1},
		{Fault{At: Quit}, 1},
		{Fault{At: Other}, 1},
		{Fault{}, 31}, // all of the above except those with AfterBytes
	}
	met := make(map[Step]bool)
	for _, tt := range tests {
		met[tt.f.At] = true
		t.Run(fmt.Sprintf("%v after %d octets", tt.f.At, tt.f.AfterBytes), func(t *testing.T) {
			s := NewUnstartedServer()
			s.Chunking = true
			bubble(t, s, func(t *testing.T) {
				f := tt.f
				f.Delay, f.Count = time.Minute, -1
				h := s.Fault(f)
				began := time.Now()
				wholeSession(t, s)
				if took := time.Since(began); h.Hits() != tt.hits || took != time.Duration(tt.hits)*time.Minute {
					t.Errorf("%d hits, want %d; took %v", h.Hits(), tt.hits, took)
				}
				if s.Stats().Accepted != 3 {
					t.Errorf("%d accepted", s.Stats().Accepted)
				}
			})
		})
	}
	for step := Step(1); step < steps; step++ {
		if !met[step] && step != Idle {
			t.Errorf("no pause at %v", step)
		}
	}
}

// A fault at Body strikes as soon as part of a chunk has arrived: its Delay holds the chunk, and a client that disconnects
// meanwhile leaves no message.
func TestPauseWithinAChunk(t *testing.T) {
	s := chunking()
	bubble(t, s, func(t *testing.T) {
		before := s.Fault(Fault{At: Bdat, Delay: time.Minute})
		within := s.Fault(Fault{At: Body, AfterBytes: 3, Delay: time.Minute})
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 10")
		r.want("250 ", "250 ")
		synctest.Wait()
		if before.Hits() != 1 || within.Hits() != 0 {
			t.Errorf("BDAT alone: %d and %d hits", before.Hits(), within.Hits())
		}
		began := time.Now()
		fmt.Fprint(r, "01")
		time.Sleep(2 * time.Minute)
		if within.Hits() != 0 {
			t.Error("the fault struck too early")
		}
		fmt.Fprint(r, "2")
		synctest.Wait()
		if within.Hits() != 1 {
			t.Error("the fault did not strike in the middle of the chunk")
		}
		fmt.Fprint(r, "3456789")
		r.want("250 ")
		if took := time.Since(began); took != 3*time.Minute {
			t.Errorf("took %v", took)
		}
	})
}
