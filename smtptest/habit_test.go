package smtptest

import (
	"testing"
	"time"
)

var habitEnvelope = []string{"RSET", "MAIL FROM:<a@x.example>", "RCPT TO:<c@y.example>", "DATA"}

// overlap sends a message and, after its final dot, another envelope: in the same write, or in a separate one that arrives before
// the dot is answered.
func overlap(r *raw, s *Server, split bool) {
	if split {
		s.Fault(Fault{At: FinalDot, Delay: time.Second})
	}
	r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
	r.want("250 ", "250 ", "354 ")
	if split {
		r.say("text", ".")
		r.say(habitEnvelope[:1]...)
		r.say(habitEnvelope[1:]...)
	} else {
		r.say(append([]string{"text", "."}, habitEnvelope...)...)
	}
}

func TestHabits(t *testing.T) {
	for _, secure := range []bool{false, true} {
		for _, split := range []bool{false, true} {
			each := func(name string, h Habit, accepted int, f func(r *raw)) {
				if secure {
					name += " over TLS"
				}
				if split {
					name += ", in separate writes"
				}
				t.Run(name, func(t *testing.T) {
					s := NewUnstartedServer()
					s.NoTLS, s.NoAuth, s.Behind = !secure, true, h
					bubble(t, s, func(t *testing.T) {
						r := open(t, s)
						overlap(r, s, split)
						f(r)
						r.silent()
						r.say(habitEnvelope...) // still in step, and no pipelining this time
						r.want("250 ", "250 ", "250 ", "354 ")
						r.say("text", ".")
						r.want("250 Ok")
						if got := s.Stats().Accepted; got != accepted {
							t.Errorf("%d accepted", got)
						}
					})
				})
			}
			each("none", HabitNone, 3, func(r *raw) {
				r.want("250 Ok", "250 ", "250 ", "250 ", "354 ")
				r.say("text", ".")
				r.want("250 Ok")
			})
			each("refuse", HabitRefuse, 2, func(r *raw) {
				const pipelined = "503 5.5.1 pipelined after end of DATA"
				r.want("250 Ok", pipelined, pipelined, pipelined, pipelined)
			})
			each("discard", HabitDiscard, 2, func(r *raw) {
				r.want("250 Ok")
			})
		}
	}
}

func TestHabitsLeaveAloneWhatComesLater(t *testing.T) {
	for _, h := range []Habit{HabitRefuse, HabitDiscard} {
		s := plainRelay()
		s.Behind = h
		bubble(t, s, func(t *testing.T) {
			r := open(t, s)
			for range 3 {
				r.send("a@x.example", "b@y.example", "text")
			}
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "354 ")
			r.say("text", ".", "QUIT")
			if h == HabitRefuse {
				r.want("250 ", "503 ")
				r.say("QUIT")
			} else {
				r.want("250 ")
				r.silent()
				r.say("QUIT")
			}
			r.want("221 ")
			r.closed()
		})
	}
}

func TestRefusedChunkIsSkipped(t *testing.T) {
	s := plainRelay()
	s.Behind, s.Chunking = HabitRefuse, true
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6 LAST", "text", "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6 LAST", "QUIT", "RSET")
		r.want("250 ", "250 ", "250 Ok", "503 ", "503 ", "503 ", "503 ")
		r.say("NOOP")
		r.want("250 ")
	})
}
