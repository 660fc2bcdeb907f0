// The end of a Client: Close and Shutdown, when idle, under load and while connections open. The bubble of each test fails if a
// goroutine is left.
package test

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// load is traffic that continues until the client is closed.
type load struct {
	running sync.WaitGroup
	mu      sync.Mutex // guards the field below
	all     []sent
}

// startLoad starts senders that each send one message after the other, until a Send fails because the client is closed.
func startLoad(ctx context.Context, client *smtprelay.Client, senders int) *load {
	l := &load{}
	for i := range senders {
		l.running.Go(func() {
			for n := 0; ; n++ {
				s := sendOne(ctx, client, 10_000*i+n)
				l.mu.Lock()
				l.all = append(l.all, s)
				l.mu.Unlock()
				if s.err != nil {
					return
				}
			}
		})
	}
	return l
}

// wait returns the results of all messages, once the last one has ended.
func (l *load) wait() []sent {
	l.running.Wait()
	return l.all
}

// nothingLeft checks that a closed client holds no resources.
func nothingLeft(t *testing.T, relay *smtptest.Server, client *smtprelay.Client) {
	t.Helper()
	synctest.Wait()
	want(t, "connections open", relay.Stats().Open, 0)
	s := client.Stats()
	want(t, "Stats().OpenConns", s.OpenConns, 0)
	want(t, "Stats().IdleConns", s.IdleConns, 0)
	want(t, "Stats().Waiting", s.Waiting, 0)
	if _, err := client.Send(t.Context(), numbered(-1)); !errors.Is(err, smtprelay.ErrClosed) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
		t.Errorf("a Send afterwards: %v; want ErrClosed, not accepted", err)
	}
}

// Under load Shutdown finishes what is in progress, and each Send is either accepted or fails with ErrClosed.
func TestShutdownUnderLoadLosesNothing(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		client := newClient(t, configOf(relay))
		l := startLoad(t.Context(), client, 50)
		time.Sleep(time.Second + 7*time.Millisecond)
		began := time.Now()
		if err := client.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		// A message in progress takes up to three round trips, and so does QUIT.
		if took := time.Since(began); took > time.Second {
			t.Errorf("Shutdown took %v", took)
		}
		all := l.wait()
		for _, s := range all {
			if s.err != nil && (!errors.Is(s.err, smtprelay.ErrClosed) || s.outcome() != smtprelay.NotAccepted) {
				t.Errorf("message %d: %v; want it accepted, or ErrClosed", s.number, s.err)
			}
		}
		checkLedger(t, relay, all)
		nothingLeft(t, relay, client)
		for _, c := range relay.Conns() {
			if c.Accepted > 0 { // a dial in progress is abandoned
				want(t, "QUITs on a connection", c.Commands["QUIT"], 1)
			}
		}
	})
}

// Close does not wait: messages whose final dot has no reply are unknown, and no others.
func TestCloseUnderLoadEndsEverySendWithItsOutcome(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		const loaded = 300 * time.Millisecond // all connections work, and the first ones have been replaced
		for after := loaded; after < loaded+20*time.Millisecond; after += 3 * time.Millisecond {
			relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
			cfg := configOf(relay)
			cfg.Limits.MaxMessagesPerConn = 20
			client := newClient(t, cfg)
			l := startLoad(t.Context(), client, 50)
			time.Sleep(after)
			began := time.Now()
			if err := client.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			if took := time.Since(began); took != 0 {
				t.Errorf("Close took %v", took)
			}
			all := l.wait()
			for _, s := range all {
				if s.err != nil && !errors.Is(s.err, smtprelay.ErrClosed) {
					t.Errorf("message %d: %v; want ErrClosed", s.number, s.err)
				}
				if s.err != nil && time.Since(began) > 0 {
					t.Errorf("message %d ended %v after Close", s.number, time.Since(began))
				}
			}
			relay.Close()
			checkLedger(t, relay, all)
			nothingLeft(t, relay, client)
		}
	})
}

// A Shutdown whose context ends closes the rest, and reports it.
func TestShutdownThatTakesTooLongEndsAsClose(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		client := newClient(t, configOf(relay))
		slow := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Hour, Count: -1})
		l := startLoad(t.Context(), client, 60) // more than can be in flight
		if err := slow.Wait(t.Context(), 10); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if err := client.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v, want the context's error", err)
		}
		if took := time.Since(began); took != time.Minute {
			t.Errorf("Shutdown took %v, want a minute", took)
		}
		unknown := 0
		for _, s := range l.wait() {
			if !errors.Is(s.err, smtprelay.ErrClosed) {
				t.Errorf("message %d: %v; want ErrClosed", s.number, s.err)
			}
			if s.outcome() == smtprelay.Unknown {
				unknown++
			}
		}
		if most := map[bool]int{false: 10, true: 10 * 4}[relay.Chunking]; unknown < 10 || unknown > most {
			t.Errorf("%d messages are unknown, want those that wait for their final reply, 10 to %d", unknown, most)
		}
		relay.Close()
		nothingLeft(t, relay, client)
	})
}

// Close and Shutdown may be called from anywhere, any number of times, concurrently with everything else.
func TestCloseAndShutdownConcurrently(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		for _, calls := range [][]string{
			{"close", "close"}, {"shutdown", "shutdown"}, {"shutdown", "close"}, {"close", "shutdown", "close", "shutdown"},
		} {
			relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
			client := newClient(t, configOf(relay))
			l := startLoad(t.Context(), client, 30)
			time.Sleep(203 * time.Millisecond)
			var ending sync.WaitGroup
			for _, call := range calls {
				ending.Go(func() {
					end := client.Close
					if call == "shutdown" {
						end = func() error { return client.Shutdown(t.Context()) }
					}
					if err := end(); err != nil {
						t.Errorf("%v: %s: %v", calls, call, err)
					}
					if client.Stats().OpenConns != 0 {
						t.Errorf("%v: %s returned with %d connections open", calls, call, client.Stats().OpenConns)
					}
				})
			}
			ending.Wait()
			all := l.wait()
			for _, s := range all {
				if s.err != nil && !errors.Is(s.err, smtprelay.ErrClosed) {
					t.Errorf("%v: message %d: %v; want ErrClosed", calls, s.number, s.err)
				}
				if s.outcome() == smtprelay.Unknown && !slices.Contains(calls, "close") {
					t.Errorf("%v: message %d: %v", calls, s.number, s.err)
				}
			}
			if err := client.Close(); err != nil {
				t.Errorf("Close once more: %v", err)
			}
			if err := client.Shutdown(t.Context()); err != nil {
				t.Errorf("Shutdown once more: %v", err)
			}
			relay.Close()
			checkLedger(t, relay, all)
			nothingLeft(t, relay, client)
		}
	})
}

// A dial in progress is abandoned, at each of its steps.
func TestCloseAndShutdownDuringADial(t *testing.T) {
	for _, step := range []smtptest.Step{0, smtptest.Connect, smtptest.EHLO, smtptest.StartTLS, smtptest.TLSHandshake} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			for _, shutdown := range []bool{false, true} {
				relay := newRelay(t, near, func(s *smtptest.Server) { s.NoTLS = false })
				cfg := configOf(relay)
				dialling := make(chan struct{}, 10)
				if step == 0 {
					cfg.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
						dialling <- struct{}{}
						<-ctx.Done()
						return nil, ctx.Err()
					}
				}
				client := newClient(t, cfg)
				stuck := relay.Fault(smtptest.Fault{At: step, Stall: true, Count: -1})
				l := startLoad(t.Context(), client, 5)
				if step == 0 {
					<-dialling
				} else if err := stuck.Wait(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				end := client.Close
				patience := time.Duration(0)
				if shutdown { // it waits for the Sends that wait for the dial
					patience = time.Second
					end = func() error {
						ctx, cancel := context.WithTimeout(t.Context(), patience)
						defer cancel()
						return client.Shutdown(ctx)
					}
				}
				if err := end(); (err != nil) != shutdown {
					t.Errorf("at %v: %v", step, err)
				}
				if took := time.Since(began); took != patience {
					t.Errorf("at %v, Shutdown %t: took %v", step, shutdown, took)
				}
				for _, s := range l.wait() {
					if !errors.Is(s.err, smtprelay.ErrClosed) || s.outcome() != smtprelay.NotAccepted {
						t.Errorf("at %v: message %d: %v; want ErrClosed, not accepted", step, s.number, s.err)
					}
				}
				stuck.Remove()
				nothingLeft(t, relay, client)
				want(t, "messages at the relay", relay.Stats().Accepted, 0)
			}
		})
	}
}

// They do not wait for ever for a relay that never answers QUIT, or never closes: Timeouts.Quit bounds the wait, once for all
// connections.
func TestEndIsBoundedWhenTheRelayNeverAnswersQUIT(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		for _, fault := range []smtptest.Fault{
			{At: smtptest.Quit, Stall: true},
			{At: smtptest.Quit, Delay: time.Hour},
			{At: smtptest.Quit, Reply: "500 what?"},
		} {
			for _, shutdown := range []bool{false, true} {
				relay := newRelay(t, near)
				fault.Count = -1
				relay.Fault(fault)
				cfg := configOf(relay)
				cfg.Timeouts.Quit = 7 * time.Second
				client := newClient(t, cfg)
				// Ten idle connections.
				slow := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Second, Count: 10})
				all := sendAtOnce(t.Context(), client, 0, 10)
				want(t, "messages at once", slow.Hits(), 10)
				began := time.Now()
				end, most := client.Close, time.Duration(0)
				if shutdown {
					end, most = func() error { return client.Shutdown(t.Context()) }, cfg.Timeouts.Quit
				}
				if err := end(); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > most {
					t.Errorf("%v, Shutdown %t: took %v, want %v at most", fault, shutdown, took, most)
				}
				allAccepted(t, relay, all)
				want(t, "Stats().OpenConns", client.Stats().OpenConns, 0)
			}
		}
	})
}

func TestShutdownSendsMessagesThatWaitForAConnection(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: 500 * time.Millisecond, Count: -1})
		cfg := configOf(relay)
		cfg.Limits.MaxConns = 1
		client := newClient(t, cfg)
		var senders sync.WaitGroup
		for i := range 30 {
			senders.Go(func() {
				if _, err := client.Send(t.Context(), numbered(i)); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if s := client.Stats(); s.Waiting < 25 {
			t.Fatalf("%d wait, want most of them", s.Waiting)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := client.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		senders.Wait()
		want(t, "accepted", len(relay.Messages()), 30)
		nothingLeft(t, relay, client)
	})
}
