// Failover: which errors send a message to the next relay, which do not, and how long a relay rests.
package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// pair is two relays in memory and a Failover over their Clients.
type pair struct {
	first, second *smtptest.Server
	clients       []*smtprelay.Client
	*smtprelay.Failover
}

func newPair(t *testing.T, set ...func(*smtprelay.Config)) *pair {
	p := &pair{}
	for _, relay := range []**smtptest.Server{&p.first, &p.second} {
		*relay = newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
		cfg := (*relay).Config()
		cfg.Retry.MaxAttempts = 1
		for _, f := range set {
			f(&cfg)
		}
		p.clients = append(p.clients, newClient(t, cfg))
	}
	p.Failover = smtprelay.NewFailover(p.clients...)
	return p
}

// accepted is how many messages each relay has accepted.
func (p *pair) accepted() string {
	return fmt.Sprint(len(p.first.Messages()), " ", len(p.second.Messages()))
}

func TestNextRelayIsUsedOnlyIfTheRelayIsAtFault(t *testing.T) {
	for _, tt := range []struct {
		why     string
		fault   smtptest.Fault
		goesOn  bool
		outcome smtprelay.Outcome
	}{
		{"greeting", smtptest.Fault{At: smtptest.Connect, Reply: "554 no"}, true, smtprelay.Accepted},
		{"too many connections", smtptest.Fault{At: smtptest.Connect, Reply: "421 too many connections", Drop: true}, true, smtprelay.Accepted},
		{"EHLO", smtptest.Fault{At: smtptest.EHLO, Reply: "550 who are you"}, true, smtprelay.Accepted},
		{"credentials", smtptest.Fault{At: smtptest.Auth, Reply: "535 no"}, true, smtprelay.Accepted},
		{"lost at MAIL", smtptest.Fault{At: smtptest.Mail, Drop: true}, true, smtprelay.Accepted},
		{"421 at RCPT", smtptest.Fault{At: smtptest.Rcpt, Reply: "421 bye", Drop: true}, true, smtprelay.Accepted},
		{"lost at DATA", smtptest.Fault{At: smtptest.Data, Drop: true}, true, smtprelay.Accepted},
		{"421 to the final dot", smtptest.Fault{At: smtptest.FinalDot, Reply: "421 bye", Drop: true}, true, smtprelay.Accepted},
		{"the sender is refused", smtptest.Fault{At: smtptest.Mail, Reply: "550 not you"}, false, smtprelay.NotAccepted},
		{"the recipient is refused", smtptest.Fault{At: smtptest.Rcpt, Reply: "550 nobody"}, false, smtprelay.NotAccepted},
		{"the recipient is refused temporarily", smtptest.Fault{At: smtptest.Rcpt, Reply: "450 greylisted"}, false, smtprelay.NotAccepted},
		{"the message is refused", smtptest.Fault{At: smtptest.FinalDot, Reply: "554 spam"}, false, smtprelay.NotAccepted},
		{"unknown: lost after acceptance", smtptest.Fault{At: smtptest.Accepted, Drop: true}, false, smtprelay.Unknown},
		{"unknown: lost at the final dot", smtptest.Fault{At: smtptest.FinalDot, Drop: true}, false, smtprelay.Unknown},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				tt.fault.Count = -1
				p.first.Fault(tt.fault)
				_, err := p.Send(t.Context(), numbered(1))
				e, _ := errors.AsType[*smtprelay.Error](err)
				if tt.goesOn {
					if err != nil || p.accepted() != "0 1" {
						t.Errorf("got %v and %s accepted, want it sent by the second", err, p.accepted())
					}
				} else if e == nil || e.Outcome != tt.outcome || len(p.second.Conns()) != 0 {
					t.Errorf("got %v and %d connections to the second, want %v and none", err, len(p.second.Conns()), tt.outcome)
				}
			})
		})
	}
}

func TestFailedRelayRestsAndIsTriedByOneSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		down := p.first.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "554 down", Count: -1})
		send := func() {
			if _, err := p.Send(t.Context(), numbered(1)); err != nil {
				t.Error(err)
			}
		}
		for range 5 {
			send()
		}
		want(t, "tries of the failed relay", down.Hits(), 1)
		time.Sleep(30 * time.Second)
		var senders sync.WaitGroup
		for range 5 {
			senders.Go(send)
		}
		senders.Wait()
		want(t, "tries after its rest, of five at once", down.Hits(), 2)
		time.Sleep(30 * time.Second)
		send()
		want(t, "tries within its longer rest", down.Hits(), 2)
		time.Sleep(30 * time.Second)
		down.Remove()
		before := len(p.first.Messages())
		for range 3 {
			send()
		}
		want(t, "messages once it works again", len(p.first.Messages())-before, 3)
	})
}

func TestOneFailureOfManySendsIsCountedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		down := p.first.Fault(smtptest.Fault{At: smtptest.Mail, Delay: time.Second, Drop: true, Count: -1})
		var senders sync.WaitGroup
		for range 5 {
			senders.Go(func() {
				if _, err := p.Send(t.Context(), numbered(1)); err != nil {
					t.Error(err)
				}
			})
			time.Sleep(100 * time.Millisecond)
		}
		senders.Wait()
		down.Remove()
		time.Sleep(31 * time.Second)
		if _, err := p.Send(t.Context(), numbered(1)); err != nil || p.accepted() != "1 5" {
			t.Errorf("got %v and %s accepted, want the first relay used after its first rest", err, p.accepted())
		}
	})
}

func TestRestingRelayIsUsedIfAllOthersFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.first.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "554 down"})
		if _, err := p.Send(t.Context(), numbered(1)); err != nil {
			t.Fatal(err)
		}
		p.second.Fault(smtptest.Fault{At: smtptest.Mail, Drop: true, Count: -1})
		time.Sleep(5 * time.Second)
		if _, err := p.Send(t.Context(), numbered(2)); err != nil || p.accepted() != "1 1" {
			t.Errorf("got %v and %s accepted, want the first relay used again", err, p.accepted())
		}
		p.first.Fault(smtptest.Fault{At: smtptest.Mail, Drop: true, Count: -1})
		_, err := p.Send(t.Context(), numbered(3))
		if e, _ := errors.AsType[*smtprelay.Error](err); e == nil || e.Outcome != smtprelay.NotAccepted {
			t.Errorf("both fail: got %v", err)
		}
	})
}

// The rest of a body that was begun is only a part of the message.
func TestBodyThatWasBegunIsNotSentToTheNextRelay(t *testing.T) {
	const text = "Subject: hi\r\n\r\nhi\r\n"
	for _, tt := range []struct {
		why    string
		body   func() io.WriterTo
		at     smtptest.Step
		goesOn bool
	}{
		{"a Reader that was begun", func() io.WriterTo { return smtprelay.Reader(struct{ io.Reader }{strings.NewReader(text)}) }, smtptest.FinalDot, false},
		{"a Buffer that was begun", func() io.WriterTo { return bytes.NewBufferString(text) }, smtptest.FinalDot, true},
		{"a Reader that can seek", func() io.WriterTo { return smtprelay.Reader(strings.NewReader(text)) }, smtptest.FinalDot, true},
		{"a Reader that was not", func() io.WriterTo { return smtprelay.Reader(struct{ io.Reader }{strings.NewReader(text)}) }, smtptest.Mail, true},
		{"a Buffer that was not", func() io.WriterTo { return bytes.NewBufferString(text) }, smtptest.Connect, true},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				p.first.Fault(smtptest.Fault{At: tt.at, Reply: "421 bye", Drop: true, Count: -1})
				m := numbered(1)
				m.Body = tt.body()
				_, err := p.Send(t.Context(), m)
				if !tt.goesOn {
					if err == nil || len(p.second.Conns()) != 0 {
						t.Errorf("got %v and %d connections to the second, want an error", err, len(p.second.Conns()))
					}
					return
				}
				if err != nil || p.accepted() != "0 1" || string(p.second.Messages()[0].Body) != text {
					t.Errorf("got %v and %s accepted, want the whole message sent by the second", err, p.accepted())
				}
			})
		})
	}
}

func TestBodyThatFailsIsNotTheRelaysFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		m := numbered(1)
		m.Body = failing{}
		if _, err := p.Send(t.Context(), m); err == nil || len(p.second.Conns()) != 0 {
			t.Errorf("got %v and %d connections to the second", err, len(p.second.Conns()))
		}
	})
}

type failing struct{}

func (failing) WriteTo(io.Writer) (int64, error) { return 0, errors.New("no such template") }

// An unreachable relay that never answers uses up the context of one Send, but not that of the next.
func TestUnreachableRelayRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		silent := p.first.Fault(smtptest.Fault{At: smtptest.Connect, Stall: true, Count: -1})
		send := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := p.Send(ctx, numbered(1))
			return err
		}
		if err := send(); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the context's error", err)
		}
		began := time.Now()
		if err := send(); err != nil || time.Since(began) != 0 {
			t.Errorf("got %v after %v, want it sent at once by the second", err, time.Since(began))
		}
		silent.Remove()
	})
}

func TestPingSucceedsIfOneRelayDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := func(context.Context, string, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED }
		down := newClient(t, smtprelay.Config{Addr: "relay.example:25", Dial: refused, Retry: smtprelay.Retry{MaxAttempts: 1}})
		p := newPair(t)
		if err := smtprelay.NewFailover(down, p.clients[1]).Ping(t.Context()); err != nil {
			t.Errorf("one works: got %v", err)
		}
		if err := smtprelay.NewFailover(down, down).Ping(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("none works: got %v", err)
		}
		if err := p.SendMail("a@x.example", []string{"b@y.example"}, []byte("Subject: hi\r\n\r\nhi\r\n")); err != nil {
			t.Error(err)
		}
		if err := p.Shutdown(t.Context()); err != nil || p.first.Stats().Open+p.second.Stats().Open != 0 {
			t.Errorf("Shutdown: %v, %d connections are open", err, p.first.Stats().Open+p.second.Stats().Open)
		}
		if _, err := p.Send(t.Context(), numbered(1)); !errors.Is(err, smtprelay.ErrClosed) {
			t.Errorf("got %v, want ErrClosed", err)
		}
		if _, err := smtprelay.NewFailover().Send(t.Context(), numbered(1)); err == nil {
			t.Error("no relays: the message was sent")
		}
	})
}
