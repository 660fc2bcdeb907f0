// Which events the filters of a Fault select: after a limit per session, every Nth, above a rate, and on one of several
// connections. What a fault does to an event is in fault_test.go.

package smtptest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestFilters(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		third := s.Fault(Fault{At: FinalDot, Nth: 3, Reply: "451 third"})
		fromFifth := s.Fault(Fault{At: FinalDot, Nth: 5, Count: 2, Reply: "451 fifth and sixth"})
		always := s.Fault(Fault{At: Rcpt, Rcpt: "GONE@y.example", Count: -1, Reply: "550 gone"})
		holds := s.Fault(Fault{At: Data, Rcpt: "ann@y.example", Reply: "451 not with ann"})
		second := s.Fault(Fault{At: Mail, Conn: 2, Reply: "451 second connection"})
		counts := s.Fault(Fault{Count: -1, When: func(e Event) bool {
			return e.Step == FinalDot && e.From == "a@x.example" && e.To[0] == "b@y.example" && e.Bytes == 6 && e.Conn == 1
		}})
		r := open(t, s)
		for i, want := range []string{"250 ", "250 ", "451 third", "250 ", "451 fifth", "451 fifth", "250 "} {
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "RCPT TO:<gone@y.example>", "DATA")
			r.want("250 ", "250 ", "550 gone", "354 ")
			r.say("text", ".")
			r.want(want)
			if i == 3 {
				always.Remove()
				always = s.Fault(Fault{At: Rcpt, Rcpt: "gone@y.example", Count: -1, Reply: "550 gone again"})
			}
		}
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<ann@y.example>", "DATA", "RSET")
		r.want("250 ", "250 ", "554 ") // nothing may follow DATA
		r = open(t, s)
		r.say("MAIL FROM:<a@x.example>")
		r.want("451 second connection")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<ann@y.example>", "DATA")
		r.want("250 ", "250 ", "451 not with ann")
		for _, h := range []struct {
			*FaultHandle
			hits int
		}{{third, 1}, {fromFifth, 2}, {always, 3}, {holds, 1}, {second, 1}, {counts, 7}} {
			if h.Hits() != h.hits {
				t.Errorf("%+v: %d hits, want %d", h.f, h.Hits(), h.hits)
			}
		}
	})
}

// sessionLimits are replies of relays when a session has reached its limit of messages or recipients.
var sessionLimits = []string{
	"452 4.4.5 Maximum number of messages per session exceeded",
	"452 4.5.3 Too many recipients in this session",
	"450 4.7.1 Too many messages, please reconnect",
	"451 4.3.0 session quota used up",
	"421 4.7.0 Too many messages in this connection",
}

func TestSessionHasALimitOfMessages(t *testing.T) {
	envelope := []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA"}
	for i, at := range []Step{Mail, Rcpt, Data} {
		for _, reply := range sessionLimits {
			t.Run(at.String()+" "+reply, func(t *testing.T) {
				s := plainRelay()
				bubble(t, s, func(t *testing.T) {
					h := s.Fault(Fault{At: at, AfterMessages: 5, Reply: reply, Count: -1})
					for range 2 { // each session has its own limit
						r := open(t, s)
						for range 5 {
							r.send("a@x.example", "b@y.example", "text")
						}
						for range 2 { // the connection stays open, and keeps refusing
							r.say(envelope[:i+1]...)
							r.want([]string{"250 ", "250 ", "354 "}[:i]...)
							r.want(reply)
							r.say("RSET")
							r.want("250 ")
						}
					}
					if h.Hits() != 4 || s.Stats().Accepted != 10 || s.Stats().Open != 2 {
						t.Errorf("%d hits, %+v", h.Hits(), s.Stats())
					}
				})
			})
		}
	}
}

// Refused messages are not counted, and a limit may close the connection.
func TestSessionLimitCountsWhatWasTaken(t *testing.T) {
	s := plainRelay()
	s.Reject = map[string]string{"no@y.example": "550 no"}
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Mail, AfterMessages: 1, Reply: "421 4.7.0 Enough", Drop: true, Count: -1})
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<no@y.example>", "RSET")
		r.want("250 ", "550 ", "250 ")
		r.send("a@x.example", "b@y.example", "text")
		r.say("MAIL FROM:<a@x.example>")
		r.want("421 4.7.0 Enough")
		r.closed()
	})
}

func TestSessionHasALimitOfRecipients(t *testing.T) {
	s := plainRelay()
	s.Reject = map[string]string{"no@y.example": "550 no"}
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Rcpt, AfterRecipients: 3, Reply: sessionLimits[1], Count: -1})
		r := open(t, s)
		r.send("a@x.example", "b@y.example", "text")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "RCPT TO:<no@y.example>", "RSET")
		r.want("250 ", "250 ", "550 ", "250 ")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "RCPT TO:<c@y.example>", "DATA")
		r.want("250 ", "250 ", sessionLimits[1], "354 ")
		r.say(".")
		r.want("250 ")
		if to := s.Messages()[1].To; !slices.Equal(to, []string{"b@y.example"}) {
			t.Errorf("%q", to)
		}
		open(t, s).send("a@x.example", "b@y.example", "text")
	})
}

func TestSessionForgetsItsLogin(t *testing.T) {
	for _, reply := range []string{"530 5.7.1 Authentication required", "503 5.5.1 Authenticate first", "502 5.5.1 Not now", "550 5.7.1 Relaying denied, authenticate"} {
		s := authRelay()
		bubble(t, s, func(t *testing.T) {
			s.Fault(Fault{At: Mail, AfterMessages: 2, Reply: reply, Count: -1})
			for range 2 {
				r := open(t, s)
				r.send("a@x.example", "b@y.example", "text")
				r.send("a@x.example", "b@y.example", "text")
				r.say("MAIL FROM:<a@x.example>", "NOOP", "MAIL FROM:<a@x.example>")
				r.want(reply, "250 ", reply)
			}
		})
	}
}

// hits returns the numbers of the events that f strikes, out of 30.
func hits(t *testing.T, f Fault) string {
	t.Helper()
	s := plainRelay()
	var struck []string
	bubble(t, s, func(t *testing.T) {
		f.At, f.Reply, f.Count = Noop, "450 no", -1
		s.Fault(f)
		r := open(t, s)
		for i := range 30 {
			r.say("NOOP")
			if reply, _ := r.reply(); reply == f.Reply {
				struck = append(struck, fmt.Sprint(i+1))
			}
		}
	})
	return strings.Join(struck, " ")
}

func TestEvery(t *testing.T) {
	for _, tt := range []struct {
		nth, every int
		want       string
	}{
		{0, 10, "10 20 30"},
		{1, 10, "10 20 30"},
		{2, 10, "11 21"}, // the first is spared, then every tenth struck
		{28, 0, "28 29 30"},
		{28, 1, "28 29 30"},
		{31, 0, ""},
	} {
		if got := hits(t, Fault{Nth: tt.nth, Every: tt.every}); got != tt.want {
			t.Errorf("Nth %d, Every %d: %s; want %s", tt.nth, tt.every, got, tt.want)
		}
	}
}

// Good credentials are refused from time to time, at once or after a delay.
func TestAuthHiccups(t *testing.T) {
	for _, delay := range []time.Duration{0, 20 * time.Second} {
		s := authRelay()
		bubble(t, s, func(t *testing.T) {
			s.Fault(Fault{At: Auth, Nth: 2, Every: 3, Delay: delay, Reply: "535 5.7.8 Authentication failed", Count: -1})
			var replies []string
			began := time.Now()
			for range 7 {
				r := greeted(t, s)
				r.say("AUTH PLAIN " + plain(s))
				reply, _ := r.reply()
				replies = append(replies, reply[:3])
				r.Close()
			}
			if got := strings.Join(replies, " "); got != "235 235 235 535 235 235 535" {
				t.Error(got)
			}
			if took := time.Since(began); took != 2*delay {
				t.Errorf("took %v", took)
			}
		})
	}
}

// burst sends n messages at once and returns how many were accepted.
func (r *raw) burst(n int) (taken int) {
	r.t.Helper()
	for range n {
		r.say("RSET", "MAIL FROM:<a@x.example>")
		r.want("250 ")
		if reply, _ := r.reply(); reply[0] == '4' {
			continue
		}
		r.say("RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "354 ")
		r.say("text", ".")
		if reply, _ := r.reply(); reply[0] == '2' {
			taken++
		}
	}
	return taken
}

func TestRate(t *testing.T) {
	const slower = "454 Throttling failure: Maximum sending rate exceeded."
	for _, at := range []Step{Mail, FinalDot} {
		for _, tt := range []struct {
			rate  float64
			burst int
			waits []time.Duration // before each burst of 30 messages
			taken []int
		}{
			{14, 0, []time.Duration{0, 0, time.Second / 14, 499 * time.Millisecond, time.Hour}, []int{14, 0, 0, 7, 14}},
			{14, 3, []time.Duration{0, time.Second, 0}, []int{3, 3, 0}},
			{0.5, 0, []time.Duration{0, time.Second, time.Second, 4 * time.Second}, []int{1, 0, 1, 1}},
			{200, 0, []time.Duration{0, time.Second}, []int{30, 30}},
			{2, 1, []time.Duration{0, 499 * time.Millisecond, time.Millisecond}, []int{1, 0, 1}},
		} {
			s := plainRelay()
			bubble(t, s, func(t *testing.T) {
				h := s.Fault(Fault{At: at, Rate: tt.rate, Burst: tt.burst, Reply: slower, Count: -1})
				rs := []*raw{open(t, s), open(t, s)}
				refused := 0
				for i, wait := range tt.waits {
					time.Sleep(wait)
					if tt.rate == 14 && tt.burst == 0 && i == 2 {
						continue // the tokens of this wait remain for the next
					}
					taken := rs[0].burst(15) + rs[1].burst(15) // two clients share it
					if taken != tt.taken[i] {
						t.Errorf("at %v, %v a second, burst %d: %d taken after %v, want %d", at, tt.rate, tt.burst, taken, wait, tt.taken[i])
					}
					refused += 30 - taken
				}
				if h.Hits() != refused {
					t.Errorf("%d hits, %d refused", h.Hits(), refused)
				}
			})
		}
	}
}

// An event that another fault has struck takes no token of the rate.
func TestRateCountsNoEventOfAnotherFault(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Noop, Reply: "250 other", Count: 5})
		s.Fault(Fault{At: Noop, Rate: 1, Reply: "450 slower", Count: -1})
		r := open(t, s)
		for range 5 {
			r.say("NOOP")
			r.want("250 other")
		}
		r.say("NOOP", "NOOP")
		r.want("250 ", "450 slower")
	})
}

// Silence at each step, on selected connections, while the others are served.
func TestSilenceOnOneConnection(t *testing.T) {
	for step := Connect; step < steps; step++ {
		if step == Other || step == Bdat || step == Idle {
			continue // the client below does not reach it
		}
		t.Run(step.String(), func(t *testing.T) {
			s := NewUnstartedServer()
			bubble(t, s, func(t *testing.T) {
				h := s.Fault(Fault{At: step, Conn: 2, Stall: true, Count: -1})
				whole := func(r *raw) {
					r.ready(s)
					r.say("NOOP", "RSET")
					r.want("250 ", "250 ")
					r.send("a@x.example", "b@y.example", "text")
					r.say("QUIT")
					r.want("221 ")
				}
				if step == AuthResponse {
					whole = func(r *raw) {
						r.want("220 ")
						r.say("STARTTLS")
						r.want("220 ")
						r.tls(clientTLS(s))
						r.say("EHLO client.test")
						r.want("250-")
						r.say("AUTH LOGIN " + base64Of(s.Username))
						r.want("334 ")
						r.say(base64Of(s.Password))
						r.want("235 ")
					}
				}
				whole(dial(t, s))
				silent := dial(t, s)
				done := make(chan bool, 1)
				go func() {
					stub := *silent
					stub.t = &quiet{TB: t}
					defer func() { done <- recover() == nil }()
					whole(&stub)
				}()
				time.Sleep(time.Hour)
				if h.Hits() != 1 || len(done) != 0 {
					t.Errorf("%d hits, the client has ended: %t", h.Hits(), len(done) != 0)
				}
				whole(dial(t, s))
				silent.Close()
				if <-done {
					t.Error("the client got a reply")
				}
			})
		})
	}
}

// quiet is a testing.TB whose Fatalf ends the client, not the test.
type quiet struct{ testing.TB }

func (quiet) Helper()               {}
func (quiet) Fatalf(string, ...any) { panic("ended") }

// A fault with Addr strikes only connections to that address.
func TestFaultOfAnAddress(t *testing.T) {
	s := plainRelay()
	s.Addresses = 2
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Connect, Addr: 2, Reply: "421 4.3.2 draining", Drop: true, Count: -1})
		s.Fault(Fault{At: Idle, Addr: 1, Delay: time.Minute, Reply: "421 4.4.2 idle", Drop: true, Count: -1})
		first := open(t, s)
		nc, err := s.Dial(t.Context(), "tcp", s.Addrs()[1])
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		b := make([]byte, 100)
		n, _ := nc.Read(b)
		if got := string(b[:n]); got != "421 4.3.2 draining\r\n" {
			t.Errorf("%q", got)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		first.want("421 4.4.2 idle")
	})
}
