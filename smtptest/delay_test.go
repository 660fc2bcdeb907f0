package smtptest

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const rtt = 100*time.Millisecond + 1 // odd, so that the halves differ

// clock measures how long each step of a dialogue takes.
type clock struct {
	t    *testing.T
	last time.Time
}

func (c *clock) took(want time.Duration, what string) {
	c.t.Helper()
	if got := time.Since(c.last); got != want {
		c.t.Errorf("%s took %v, want %v", what, got, want)
	}
	c.last = time.Now()
}

func TestDelayLineIsExact(t *testing.T) {
	s := NewUnstartedServer()
	s.Delay = rtt
	bubble(t, s, func(t *testing.T) {
		c := &clock{t, time.Now()}
		r := dial(t, s)
		c.took(rtt, "connecting")
		r.want("220 ")
		c.took(rtt, "the greeting")
		r.say("EHLO client.test")
		r.want("250-")
		c.took(rtt, "EHLO")
		r.say("STARTTLS")
		r.want("220 ")
		c.took(rtt, "STARTTLS")
		r.tls(clientTLS(s))
		c.took(rtt, "the TLS handshake")
		r.say("EHLO client.test")
		r.want("250-")
		c.took(rtt, "EHLO with the end of the handshake")
		r.say("AUTH PLAIN "+plain(s), "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("235 ", "250 ", "250 ", "354 ")
		c.took(rtt, "AUTH and the envelope")
		r.say("text", ".", "QUIT")
		r.want("250 ", "221 ")
		c.took(rtt, "body and QUIT")
		r.closed()
		c.took(0, "the close right after the 221")
		synctest.Wait()
		if st := s.Conns()[0]; st.Turns != 6 || st.MessageTurns != 2 {
			// EHLO, STARTTLS, ClientHello, Finished and EHLO, AUTH and envelope, body
			t.Errorf("%d turns, %d for messages", st.Turns, st.MessageTurns)
		}
	})
}

func TestDelayLineCarriesTheCloseOfEitherSide(t *testing.T) {
	s := plainRelay()
	s.Delay = rtt
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		open := func(want int, when string) {
			t.Helper()
			synctest.Wait()
			if s.Stats().Open != want {
				t.Errorf("%d open %s, want %d", s.Stats().Open, when, want)
			}
		}
		r.pipe.CloseWrite()
		time.Sleep(rtt/2 - 1)
		open(1, "before the FIN has arrived")
		time.Sleep(time.Nanosecond)
		open(0, "when it has")
		time.Sleep(rtt - rtt/2 - 1)
		if r.pipe.Unread() > 0 {
			t.Error("data arrived")
		}
		c := &clock{t, time.Now()}
		r.closed()
		c.took(1, "the rest of the relay's FIN")
	})
	s = plainRelay()
	s.Delay = rtt
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		s.Fault(Fault{At: Noop, Abort: true})
		c := &clock{t, time.Now()}
		r.say("NOOP")
		r.wasReset()
		c.took(rtt, "NOOP and RST")
	})
	s = plainRelay()
	s.Delay = rtt
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.pipe.Reset()
		time.Sleep(rtt)
		synctest.Wait()
		if s.Stats().Open != 0 {
			t.Error("still open after a reset")
		}
	})
}

func TestDelayLineKeepsOrderAndHasNoBandwidth(t *testing.T) {
	s := plainRelay()
	s.Delay = rtt
	s.MaxSize = -1
	s.DropBodies = true
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "250 ", "354 ")
		c := &clock{t, time.Now()}
		line := strings.Repeat("0123456789", 7) + "\r\n"
		const n = 100_000
		for range n {
			io.WriteString(r, line)
		}
		r.say(".")
		r.want("250 ")
		c.took(rtt, "7 MB")
		if got := s.Messages()[0].Size; got != n*int64(len(line)) {
			t.Errorf("%d octets", got)
		}
	})
}

func TestDelayLineLetsAStalledRelayStopTheClient(t *testing.T) {
	s := plainRelay()
	s.Delay = rtt
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Body, Stall: true})
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "250 ", "354 ")
		r.SetWriteDeadline(time.Now().Add(time.Hour))
		n, err := io.CopyN(r, zeros{}, 1<<30)
		if ne, ok := err.(net.Error); !ok || !ne.Timeout() || n > 2*delayWindow {
			t.Errorf("%d octets, %v", n, err)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestDialOverADelayLineCanBeCancelled(t *testing.T) {
	s := plainRelay()
	s.Delay = time.Hour
	bubble(t, s, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.Dial(ctx, "", ""); err == nil || ctx.Err() == nil {
			t.Errorf("got %v", err)
		}
	})
}

// TestTurns counts the turns of dialogues. Each line is one write; the next waits for its replies.
func TestTurns(t *testing.T) {
	envelope := []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA"}
	body := []string{"text", "."}
	join := func(groups ...[]string) (all []string) {
		for _, g := range groups {
			all = append(all, g...)
		}
		return all
	}
	rset := []string{"RSET"}
	type group struct {
		says    []string
		replies int
	}
	tests := []struct {
		why      string
		groups   []group
		turns    int // after EHLO, which is not counted here
		messages int
		overlaps int
	}{
		{"nothing", nil, 0, 0, 0},
		{"NOOPs are no message turns", []group{{[]string{"NOOP"}, 1}, {[]string{"NOOP"}, 1}}, 2, 0, 0},
		{"one at a time", []group{{envelope[:1], 1}, {envelope[1:2], 1}, {envelope[2:], 1}, {body, 1}}, 4, 4, 0},
		{"a lone message", []group{{envelope, 3}, {body, 1}}, 2, 2, 0},
		{"two lone messages", []group{{envelope, 3}, {body, 1}, {join(rset, envelope), 4}, {body, 1}}, 4, 4, 0},
		{"three that overlap", []group{{envelope, 3}, {join(body, rset, envelope), 5}, {join(body, envelope), 4}, {join(body, []string{"QUIT"}), 2}}, 4, 4, 2},
		{"a NOOP first", []group{{[]string{"NOOP"}, 1}, {envelope, 3}, {body, 1}}, 3, 2, 0},
	}
	for _, tt := range tests {
		for _, delay := range []time.Duration{0, rtt} {
			t.Run(tt.why+" over "+delay.String(), func(t *testing.T) {
				s := plainRelay()
				s.Delay = delay
				bubble(t, s, func(t *testing.T) {
					r := open(t, s)
					c := &clock{t, time.Now()}
					for _, g := range tt.groups {
						r.say(g.says...)
						for range g.replies {
							r.reply()
						}
					}
					c.took(time.Duration(tt.turns)*delay, "the dialogue")
					synctest.Wait()
					if got := s.Stats().Turns - 1; got != tt.turns {
						t.Errorf("%d turns, want %d", got, tt.turns)
					}
					if got := s.Stats().MessageTurns; got != tt.messages {
						t.Errorf("%d for messages, want %d", got, tt.messages)
					}
					if got := s.Stats().Overlapped; got != tt.overlaps {
						t.Errorf("%d overlapped, want %d", got, tt.overlaps)
					}
				})
			})
		}
	}
}

func TestWhatComesTooSoonToBeAnAnswerIsNoTurn(t *testing.T) {
	for _, secure := range []bool{false, true} {
		s := NewUnstartedServer()
		s.NoAuth, s.NoTLS = true, !secure
		s.Delay = rtt
		bubble(t, s, func(t *testing.T) {
			r := open(t, s)
			before := s.Stats().Turns
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "354 ")
			r.say("text", ".") // and a little later, in a separate write, the next envelope
			time.Sleep(rtt / 3)
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "250 ", "354 ")
			r.say("text", ".")
			r.want("250 ")
			if turns, messages := s.Stats().Turns-before, s.Stats().MessageTurns; turns != 3 || messages != 3 || s.Stats().Overlapped != 1 {
				t.Errorf("%d turns, %d for messages, %d overlapped", turns, messages, s.Stats().Overlapped)
			}
		})
	}
}

func TestTurnsOverSockets(t *testing.T) {
	s := start(t, NewUnstartedServer())
	r := open(t, s)
	for range 5 {
		r.send("a@x.example", "b@y.example", "text")
	}
	r.say("QUIT")
	r.want("221 ")
	r.closed()
	if got := s.Stats().MessageTurns; got != 11 { // two for each message, and QUIT
		t.Errorf("%d turns", got)
	}
}

func TestDelayOverSockets(t *testing.T) {
	s := NewUnstartedServer()
	s.Delay = 3 * time.Millisecond
	start(t, s)
	before := time.Now()
	r := open(t, s)
	r.send("a@x.example", "b@y.example", "text")
	r.say("QUIT")
	r.want("221 ")
	r.closed()
	// Greeting (connecting included), EHLO, STARTTLS, ClientHello, EHLO, AUTH, envelope, body, QUIT. It cannot be faster.
	if took := time.Since(before); took < 10*s.Delay {
		t.Errorf("took only %v", took)
	}
	if st := s.Conns()[0]; st.Turns != 8 || st.MessageTurns != 3 {
		t.Errorf("%d turns, %d for messages", st.Turns, st.MessageTurns)
	}
}
