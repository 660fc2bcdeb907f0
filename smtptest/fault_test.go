package smtptest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// dialogue is a whole session with one message on a relay that offers CHUNKING: for each step what the client sends, and how many
// replies it then waits for.
var dialogue = []struct {
	step    Step
	says    []string
	replies int
}{
	{Connect, nil, 1},
	{EHLO, []string{"EHLO client.test"}, 1},
	{Noop, []string{"NOOP"}, 1},
	{Other, []string{"VRFY a"}, 1},
	{Mail, []string{"MAIL FROM:<a@x.example>"}, 1},
	{Rcpt, []string{"RCPT TO:<b@y.example>"}, 1},
	{Data, []string{"DATA"}, 1},
	{Body, []string{"some", "text"}, 0},
	{FinalDot, []string{"."}, 1},
	{Rset, []string{"RSET"}, 1},
	{Mail, []string{"MAIL FROM:<a@x.example>"}, 1},
	{Rcpt, []string{"RCPT TO:<b@y.example>"}, 1},
	{Bdat, []string{"BDAT 6 LAST", "text"}, 1},
	{Quit, []string{"QUIT"}, 1},
}

// until runs the dialogue up to a step, and waits for all replies before it.
func (r *raw) until(step Step) {
	r.t.Helper()
	for _, d := range dialogue {
		if len(d.says) > 0 {
			r.say(d.says...)
		}
		if d.step == step || d.step == FinalDot && step == Accepted {
			return
		}
		for range d.replies {
			if reply, err := r.reply(); err != nil || !positive(reply) {
				r.t.Fatalf("%v: %q, %v", d.step, reply, err)
			}
		}
	}
	r.t.Fatalf("the dialogue has no %v", step)
}

var plainSteps = []Step{Connect, EHLO, Mail, Rcpt, Data, Body, FinalDot, Accepted, Rset, Noop, Other, Bdat, Quit}

// taken returns how many messages are accepted if the dialogue fails at step, and only there.
func taken(step Step) int {
	if slices.Contains([]Step{Accepted, Rset, Bdat, Quit}, step) {
		return 1
	}
	return 0
}

func TestFaultsAtEachStep(t *testing.T) {
	each := func(t *testing.T, f Fault, check func(t *testing.T, s *Server, r *raw, h *FaultHandle)) {
		for _, step := range plainSteps {
			t.Run(step.String(), func(t *testing.T) {
				s := plainRelay()
				s.Chunking = true
				bubble(t, s, func(t *testing.T) {
					f := f
					f.At = step
					h := s.Fault(f)
					r := dial(t, s)
					r.until(step)
					check(t, s, r, h)
					if h.Hits() != 1 {
						t.Errorf("%d hits", h.Hits())
					}
				})
			})
		}
	}
	// The second message, which may complete after the fault at BDAT, is not counted.
	first := func(s *Server) int {
		return min(s.Stats().Accepted, 1)
	}

	t.Run("drop", func(t *testing.T) {
		each(t, Fault{Drop: true}, func(t *testing.T, s *Server, r *raw, h *FaultHandle) {
			r.closed()
			if got := s.Stats().Accepted; h.f.At != Quit && got != taken(h.f.At) {
				t.Errorf("%d accepted", got)
			}
			if s.Stats().Open != 0 {
				t.Errorf("%d open", s.Stats().Open)
			}
		})
	})
	t.Run("reset", func(t *testing.T) {
		each(t, Fault{Abort: true}, func(t *testing.T, s *Server, r *raw, h *FaultHandle) {
			r.wasReset()
			if got := first(s); got != taken(h.f.At) {
				t.Errorf("%d accepted", got)
			}
		})
	})
	t.Run("reply", func(t *testing.T) {
		each(t, Fault{Reply: "451 4.3.0 not now"}, func(t *testing.T, s *Server, r *raw, h *FaultHandle) {
			r.want("451 4.3.0 not now")
			if h.f.At == Body {
				r.say(".") // must not be answered: the reply was sent early
			}
			if h.f.At == Quit {
				r.closed()
			} else {
				r.silent()
			}
			if got := first(s); got != taken(h.f.At) {
				t.Errorf("%d accepted", got)
			}
		})
	})
	t.Run("421 and drop", func(t *testing.T) {
		each(t, Fault{Reply: "421 4.3.2 bye", Drop: true}, func(t *testing.T, s *Server, r *raw, h *FaultHandle) {
			r.want("421 4.3.2 bye")
			r.closed()
			if got := first(s); got != taken(h.f.At) {
				t.Errorf("%d accepted", got)
			}
		})
	})
	t.Run("stall until the client hangs up", func(t *testing.T) {
		each(t, Fault{Stall: true}, func(t *testing.T, s *Server, r *raw, h *FaultHandle) {
			r.silent()
			time.Sleep(time.Hour)
			r.silent()
			if s.Stats().Open != 1 {
				t.Errorf("%d open while stalled", s.Stats().Open)
			}
			r.Close()
			synctest.Wait()
			if s.Stats().Open != 0 {
				t.Errorf("%d open after the client has closed", s.Stats().Open)
			}
			if got := first(s); got != taken(h.f.At) {
				t.Errorf("%d accepted", got)
			}
		})
	})
	t.Run("stall until removed", func(t *testing.T) {
		each(t, Fault{Stall: true}, func(t *testing.T, s *Server, r *raw, h *FaultHandle) {
			r.silent()
			h.Remove()
			if h.f.At == Body {
				r.silent()
				r.say(".")
			}
			if reply, err := r.reply(); err != nil || !positive(reply) {
				t.Errorf("%q, %v", reply, err)
			}
		})
	})
	t.Run("delay", func(t *testing.T) {
		each(t, Fault{Delay: time.Minute}, func(t *testing.T, s *Server, r *raw, h *FaultHandle) {
			before := time.Now()
			if h.f.At == Body {
				r.say(".")
			}
			if reply, err := r.reply(); err != nil || !positive(reply) {
				t.Errorf("%q, %v", reply, err)
			}
			if took := time.Since(before); took != time.Minute {
				t.Errorf("took %v", took)
			}
		})
	})
}

func TestFaultsOfTLSAndAuth(t *testing.T) {
	for _, step := range []Step{StartTLS, TLSHandshake, Auth} {
		for _, f := range []Fault{{Drop: true}, {Abort: true}, {Reply: "454 4.7.0 not now", Drop: true}} {
			t.Run(fmt.Sprintf("%v %+v", step, f.Reply), func(t *testing.T) {
				s := NewUnstartedServer()
				bubble(t, s, func(t *testing.T) {
					f.At = step
					h := s.Fault(f)
					r := dial(t, s)
					r.want("220 ")
					r.say("EHLO client.test")
					r.want("250-")
					r.say("STARTTLS")
					if step != StartTLS && !(step == TLSHandshake && f.Abort) { // a reset destroys unread replies
						r.want("220 ")
					}
					if step == Auth {
						r.tls(clientTLS(s))
						r.say("AUTH PLAIN " + plain(s))
					}
					if f.Reply != "" {
						r.want(f.Reply)
					}
					rest, err := io.ReadAll(r.br)
					switch {
					case f.Abort && err == nil:
						t.Error("closed, want a reset")
					case !f.Abort && (len(rest) > 0 || err != nil):
						t.Errorf("got %q, %v, want EOF", rest, err)
					}
					r.Close()
					if h.Hits() != 1 {
						t.Errorf("%d hits", h.Hits())
					}
				})
			})
		}
	}
}

// What the client sent during a stall is not lost, including its ClientHello.
func TestStalledHandshakeGoesOn(t *testing.T) {
	for _, implicit := range []bool{false, true} {
		t.Run(fmt.Sprintf("implicit %t", implicit), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := NewUnstartedServer()
				s.InMemory = true
				s.start(implicit)
				t.Cleanup(s.Close)
				h := s.Fault(Fault{At: TLSHandshake, Stall: true})
				time.AfterFunc(time.Minute, h.Remove)
				r := dial(t, s)
				if !implicit {
					r.want("220 ")
					r.say("STARTTLS")
					r.want("220 ")
				}
				r.tls(clientTLS(s))
				if implicit {
					r.want("220 ")
				}
				r.say("EHLO client.test")
				r.want("250-")
			})
		})
	}
}

func TestPositiveReplyCarriesOut(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: EHLO, Reply: "250-odd\n250-PIPELINING\n250 X"})
		s.Fault(Fault{At: Mail, Reply: "250 fine"})
		s.Fault(Fault{At: FinalDot, Reply: "250 2.0.0 Ok 1234"})
		r := dial(t, s)
		r.want("220 ")
		r.say("EHLO client.test")
		r.want("250-odd\n250-PIPELINING\n250 X")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 fine", "250 ", "354 ")
		r.say("text", ".")
		r.want("250 2.0.0 Ok 1234")
		if s.Stats().Accepted != 1 {
			t.Errorf("%d accepted", s.Stats().Accepted)
		}
	})
}

func Test354WithoutRecipients(t *testing.T) {
	s := plainRelay()
	s.Reject = map[string]string{"b@y.example": "550 no"}
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Data, Reply: "354 go on"})
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "550 ", "354 go on")
		r.say(".", "RSET")
		r.want("554 5.5.1 No valid recipients", "250 ")
		r.send("a@x.example", "c@y.example", "text")
		if s.Stats().Accepted != 1 {
			t.Errorf("%d accepted", s.Stats().Accepted)
		}
	})
}

func TestReplyLostAfterAcceptance(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Accepted, Reply: "451 4.3.0 said, but taken"})
		r := open(t, s)
		for _, want := range []string{"451 ", "250 "} {
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "354 ")
			r.say("text", ".")
			r.want(want)
		}
		r.send("a@x.example", "c@y.example", "text")
		r.send("a@x.example", "b@y.example", "other text")
		if s.Stats().Accepted != 4 || s.Stats().Duplicates != 1 {
			t.Errorf("%d accepted, %d duplicates", s.Stats().Accepted, s.Stats().Duplicates)
		}
	})
}

func TestDelaysAddUpAndTheFirstBlowEnds(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Noop, Delay: time.Second})
		s.Fault(Fault{At: Noop, Delay: time.Second, Reply: "250 first"})
		last := s.Fault(Fault{At: Noop, Delay: time.Second, Reply: "250 second"})
		r := open(t, s)
		before := time.Now()
		r.say("NOOP")
		r.want("250 first")
		if took := time.Since(before); took != 2*time.Second || last.Hits() != 0 {
			t.Errorf("took %v, %d hits", took, last.Hits())
		}
		r.say("NOOP")
		r.want("250 second")
	})
}

func TestEarlierRepliesAreSentBeforeADelay(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Data, Delay: time.Minute})
		r := open(t, s)
		before := time.Now()
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "250 ")
		if took := time.Since(before); took != 0 {
			t.Errorf("the replies before the delayed one took %v", took)
		}
		r.want("354 ")
	})
}

func TestBodyFaultStrikesAfterSoManyOctets(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		h := s.Fault(Fault{At: Body, AfterBytes: 12, Count: -1, Nth: 2, Reply: "552 5.3.4 enough"})
		r := open(t, s)
		begin := func() {
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "354 ")
		}
		begin()
		r.say("0123456789", "0123456789", "0123456789", ".") // the first long enough
		r.want("250 ")
		begin()
		r.say("01234567", ".") // too short
		r.want("250 ")
		begin()
		r.say("0123456789") // twelve octets, with CRLF
		r.want("552 5.3.4 enough")
		r.say("more", ".", "RSET")
		r.want("250 ")
		r.silent()
		if h.Hits() != 1 || s.Stats().Accepted != 2 {
			t.Errorf("%d hits, %d accepted", h.Hits(), s.Stats().Accepted)
		}
	})
}

func TestStallInABodyStopsReading(t *testing.T) {
	s := plainRelay()
	s.Buffer = 1000
	bubble(t, s, func(t *testing.T) {
		h := s.Fault(Fault{At: Body, Stall: true})
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "250 ", "354 ")
		body := strings.Repeat("0123456789012345678901234567890123456789012345678901234567890123456789\r\n", 10_000)
		wrote := make(chan int, 1)
		go func() {
			r.SetWriteDeadline(time.Now().Add(time.Minute))
			n, _ := io.WriteString(r.Conn, body)
			wrote <- n
		}()
		n := <-wrote
		if n > 3*readBuffer {
			t.Errorf("wrote %d octets to a relay that does not read", n)
		}
		h.Remove()
		r.SetWriteDeadline(time.Time{})
		r.say(body[n:] + ".")
		r.want("250 ")
		if s.Messages()[0].Size != int64(len(body)) {
			t.Errorf("%d octets arrived of %d", s.Messages()[0].Size, len(body))
		}
	})
}

func TestWaitForHits(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		h := s.Fault(Fault{At: Noop, Count: -1})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := h.Wait(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		r := open(t, s)
		waited := make(chan error)
		go func() { waited <- h.Wait(t.Context(), 2) }()
		r.say("NOOP")
		r.want("250 ")
		synctest.Wait()
		select {
		case <-waited:
			t.Error("one hit was enough for two")
		default:
		}
		r.say("NOOP")
		r.want("250 ")
		if err := <-waited; err != nil {
			t.Error(err)
		}
	})
}

func TestResetOverSockets(t *testing.T) {
	for _, delay := range []time.Duration{0, time.Millisecond} {
		s := NewUnstartedServer()
		s.Delay = delay
		start(t, s)
		s.Fault(Fault{At: FinalDot, Abort: true})
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "250 ", "354 ")
		r.say("text", ".")
		const wsaECONNRESET = syscall.Errno(10054) // the error on Windows
		if _, err := r.br.ReadByte(); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, wsaECONNRESET) {
			t.Errorf("got %v", err)
		}
		if s.Stats().Accepted != 0 || s.Stats().Open != 0 {
			t.Errorf("%d accepted, %d open", s.Stats().Accepted, s.Stats().Open)
		}
	}
}
