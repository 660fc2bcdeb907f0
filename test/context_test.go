// Callers whose context ends: each Send ends when it should, and affects no other.
package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

func TestContextIsTheBudgetOfAllTries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var nobody noRelay
		cfg := nobody.config()
		cfg.Retry.MaxAttempts = -1
		cfg.Timeouts.Outage = -1
		client := newClient(t, cfg)
		for _, budget := range []time.Duration{time.Millisecond, time.Second, time.Minute, time.Hour} {
			ctx, cancel := context.WithTimeout(t.Context(), budget)
			before := len(nobody.dials())
			s := sendOne(ctx, client, 0)
			cancel()
			e := failure(s.err)
			want(t, "attempts", e.Attempts, max(len(nobody.dials())-before, 1))
			if s.took != budget || !errors.Is(s.err, context.DeadlineExceeded) || !e.Timeout() || e.Outcome != smtprelay.NotAccepted {
				t.Errorf("ended after %v with %v; want the end of the context after %v, not accepted", s.took, s.err, budget)
			}
			if !errors.Is(s.err, syscall.ECONNREFUSED) && !contains(s.err, "connection refused") {
				t.Errorf("%q does not name the reason for the missing connection", s.err)
			}
		}
	})
}

func TestPingEndsWithItsContextAtASilentAuth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Username: "u", Password: "secretkey", Dial: relaytest.Dial(0, func(_ int, l string) string {
			if strings.HasPrefix(l, "AUTH") {
				time.Sleep(time.Hour)
			}
			return relaytest.Agree("250-PIPELINING\n250 AUTH PLAIN", l)
		})})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		err := c.Ping(ctx)
		if took := time.Since(began); !errors.Is(err, context.DeadlineExceeded) || took != time.Second {
			t.Errorf("got %v after %v, want the context's error after a second", err, took)
		}
		c.Close()
		time.Sleep(2 * time.Hour)
	})
}

type slowBody struct{}

func (slowBody) WriteTo(w io.Writer) (int64, error) {
	time.Sleep(2 * time.Second)
	n, err := w.Write(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), 124))
	return int64(n), err
}

func TestCancelledMessageLeavesThoseInItsBufferAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stall := make(chan struct{})
		chunks := 0
		dial := relaytest.Dial(600, func(_ int, l string) string {
			if strings.HasPrefix(l, "BDAT") {
				if chunks++; chunks == 4 { // first the probe for refused chunks, then message A: a chunk and the end
					<-stall
				}
			}
			return relaytest.Agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: dial})
		big := func() smtprelay.Message {
			m := shortMessage("b@y.example")
			m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), 30))
			return m
		}
		res := make(chan string, 5)
		send := func(ctx context.Context, name string, m smtprelay.Message) {
			go func() { _, err := c.Send(ctx, m); res <- fmt.Sprintf("%s: %v", name, err) }()
			synctest.Wait()
		}
		m := big()
		m.Body = slowBody{}
		send(t.Context(), "A", m)
		send(t.Context(), "B", big())
		send(t.Context(), "C", big())
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		send(ctx, "D", big())
		send(t.Context(), "E", big())
		time.Sleep(time.Minute)
		close(stall)
		for range 5 {
			if r := <-res; !strings.HasPrefix(r, "D") && !strings.HasSuffix(r, ": <nil>") {
				t.Error(r)
			}
		}
		c.Close()
	})
}

// B, a large message after A, is cancelled while its write is blocked: A's final reply, due in 20 s, is awaited for only 2 s.
func TestCancelledWriteDoesNotHurryTheFinalReplyOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: relaytest.Dial(600, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") {
				time.Sleep(20 * time.Second)
			}
			return relaytest.Agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})})
		res := make(chan error, 1)
		go func() {
			_, err := c.Send(t.Context(), shortMessage("b@y.example"))
			res <- err
		}()
		time.Sleep(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		m := shortMessage("b@y.example")
		m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), 3000))
		if _, err := c.Send(ctx, m); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the context's error", err)
		}
		if err := <-res; err != nil {
			t.Errorf("the other message: %v", err)
		}
		c.Close()
		time.Sleep(time.Hour)
	})
}

func TestContextEndsAllOrNothingAfterAnotherMessagesLastChunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1}, Dial: relaytest.Dial(0, func(n int, l string) string {
			if strings.HasPrefix(l, "BDAT") {
				time.Sleep(time.Minute)
			}
			return relaytest.Agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})})
		first := make(chan error, 1)
		go func() {
			m := shortMessage("b@y.example")
			m.Body = slowBody{}
			_, err := c.Send(t.Context(), m)
			first <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		began := time.Now()
		m := shortMessage("b@y.example", "c@y.example")
		m.AllOrNothing = true
		_, err := c.Send(ctx, m)
		if took := time.Since(began); !errors.Is(err, context.DeadlineExceeded) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || took != 10*time.Second {
			t.Errorf("got %v after %v, want the context's error after 10 s", err, took)
		}
		if err := <-first; err != nil {
			t.Errorf("the message before: %v", err)
		}
		c.Close()
		time.Sleep(time.Minute)
	})
}

// A relay that has stopped reading delays writers, but none beyond its context.
func TestContextEndsASendThatCarriesAnotherFinalDotToAStalledRelay(t *testing.T) {
	for _, test := range []struct {
		extensions   string
		window, size int
		recipients   int
	}{
		{"250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING", 64 << 10, 13_000, 1},
		{"250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING", 600, 1000, 1},
		{"250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING", 600, 1000, 1000},
		{"250 PIPELINING", 600, 1000, 1},
		{"250 PIPELINING", 600, 1000, 1000},
		{"250 PIPELINING", 600, 16300, 1},
	} {
		t.Run(fmt.Sprintf("%v", test), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stall := make(chan struct{})
				relay := &relaytest.Relay{Window: test.window, Body: stalledWriter(stall), Answer: func(_ int, l string) string {
					return relaytest.Agree(test.extensions, l)
				}}
				c := bubbleClient(t, smtprelay.Config{Dial: relay.Dial, Limits: smtprelay.Limits{MaxConns: 1}, MaxInFlight: 32, Timeouts: smtprelay.Timeouts{Drain: 1}})
				var senders sync.WaitGroup
				for i := range 20 {
					senders.Go(func() {
						m := shortMessage("b@y.example")
						if m.Body = (slowBody{}); i > 0 {
							for range test.recipients - 1 {
								m.To = append(m.To, "b@y.example")
							}
							m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcd\r\n"), test.size/32))
							time.Sleep(time.Second)
						}
						ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
						defer cancel()
						began := time.Now()
						_, err := c.Send(ctx, m)
						if took := time.Since(began); took > 10*time.Second+1 {
							t.Errorf("message %d: %v after %v", i, err, took)
						}
					})
				}
				senders.Wait()
				close(stall)
				c.Close()
				time.Sleep(time.Hour)
			})
		})
	}
}

// If the context ends while the first connection is being opened, the error names the step that hangs: the time-outs of the steps
// are longer than most callers wait.
func TestErrorOfAWaitNamesTheStepThatHangs(t *testing.T) {
	for _, test := range []struct {
		step smtptest.Step
		says string
	}{
		{smtptest.Connect, "at step: greeting; if the relay speaks TLS from the first byte on port 587, use TLSImplicit, or smtps:// in a URL"},
		{smtptest.EHLO, "at step: EHLO"},
		{smtptest.StartTLS, "at step: STARTTLS"},
		{smtptest.TLSHandshake, "at step: TLS handshake"},
	} {
		t.Run(test.step.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
				relay.Fault(smtptest.Fault{At: test.step, Stall: true, Count: -1})
				client := newClient(t, configOf(relay))
				for _, call := range []func(context.Context) error{
					client.Ping,
					func(ctx context.Context) error { _, err := client.Send(ctx, numbered(0)); return err },
				} {
					ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
					err := call(ctx)
					cancel()
					if !errors.Is(err, context.DeadlineExceeded) || !strings.HasSuffix(err.Error(), test.says) {
						t.Errorf("got %v, want a deadline exceeded that ends in %q", err, test.says)
					}
				}
			})
		})
	}
}

// Of many senders, some give up at any moment: each of those returns at that moment, the messages of the others are all accepted,
// and the relay has exactly what the callers were told.
func TestCallersWhoGoAwayHarmNobodyElse(t *testing.T) {
	for seed := range uint64(8) {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
			cfg := configOf(relay)
			cfg.Limits.MaxConns = 3
			client := newClient(t, cfg)
			random := rand.New(rand.NewPCG(seed, 0))
			const senders, messages = 20, 10
			var mu sync.Mutex // guards all
			var all []sent
			var running sync.WaitGroup
			for i := range senders {
				patience := make([]time.Duration, messages) // before the message is given up; 0 means never
				for j := range patience {
					if random.IntN(4) == 0 {
						patience[j] = rand.N(300 * time.Millisecond)
					}
				}
				running.Go(func() {
					for j, p := range patience {
						ctx, cancel := context.WithCancel(t.Context())
						if p > 0 {
							time.AfterFunc(p, cancel)
						}
						s := sendOne(ctx, client, messages*i+j)
						cancel()
						if s.err != nil && (p == 0 || s.took != p || !errors.Is(s.err, context.Canceled)) {
							t.Errorf("seed %d: message %d, given up after %v (0s: not at all), ended after %v: %v", seed, s.number, p, s.took, s.err)
						}
						mu.Lock()
						all = append(all, s)
						mu.Unlock()
					}
				})
			}
			running.Wait()
			if err := client.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			relay.Close()
			checkLedger(t, relay, all)
			want(t, "sends that have ended", len(all), senders*messages)
			atMost(t, "open at once", relay.Stats().MaxOpen, 3)
		})
	}
}

// stalledWriter blocks the first write of a body until it is closed.
type stalledWriter chan struct{}

func (w stalledWriter) Write(p []byte) (int, error) {
	if strings.Contains("XCHUNK\r\n", string(p)) { // the probe for refused chunks, not a part of a body
		return len(p), nil
	}
	<-w
	return len(p), nil
}

// thinks is a relay that delays its final replies by d.
func thinks(d time.Duration) smtptest.Fault {
	return smtptest.Fault{At: smtptest.FinalDot, Delay: d, Count: -1}
}

// A message that is cancelled while the relay processes it is not unknown: its reply is awaited for Timeouts.Drain.
func TestSendsCancelledAtRandomLeaveNothingUnknown(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(thinks(100 * time.Millisecond))
		client := newClient(t, configOf(relay))
		outcomes := map[smtprelay.Outcome]int{}
		var mu sync.Mutex
		var senders sync.WaitGroup
		for i := range 200 {
			senders.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(2_500))*time.Millisecond)
				defer cancel()
				s := sendOne(ctx, client, i)
				mu.Lock()
				defer mu.Unlock()
				outcomes[s.outcome()]++
			})
		}
		senders.Wait()
		want(t, "unknown", outcomes[smtprelay.Unknown], 0)
		want(t, "accepted", outcomes[smtprelay.Accepted], len(relay.Messages()))
		if outcomes[smtprelay.Accepted] == 0 || outcomes[smtprelay.NotAccepted] == 0 {
			t.Errorf("got %v: the contexts ended too late or too soon to test anything", outcomes)
		}
	})
}

// Ctrl-C in the middle of a batch: no further message is begun, and those in progress are finished.
func TestSendAllFinishesMessagesInProgressWhenItsContextEnds(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(thinks(400 * time.Millisecond)) // with 4 on each connection in chunks, the last one gets its reply after 1.6 s
		client := newClient(t, configOf(relay))
		ctx, interrupt := context.WithCancel(t.Context())
		defer interrupt()
		go func() { // ends in the bubble's time
			time.Sleep(3500 * time.Millisecond)
			interrupt()
		}()
		began := time.Now()
		var taken atomic.Int64 // by an iterator that SendAll does not wait for
		outcomes := map[smtprelay.Outcome]int{}
		for r := range client.SendAll(ctx, func(yield func(smtprelay.Message) bool) {
			for yield(numbered(int(taken.Add(1)))) {
			}
		}) {
			outcomes[smtprelay.OutcomeOf(r.Err)]++
			if r.Err != nil && !smtprelay.ShouldRetry(r.Err) {
				t.Errorf("got %v, want it sent again by the next batch", r.Err)
			}
		}
		if took := time.Since(began); took > 3500*time.Millisecond+2*time.Second {
			t.Errorf("took %v, want it ended within Timeouts.Drain of the context", took)
		}
		want(t, "unknown", outcomes[smtprelay.Unknown], 0)
		want(t, "accepted", outcomes[smtprelay.Accepted], len(relay.Messages()))
		want(t, "results", outcomes[smtprelay.Accepted]+outcomes[smtprelay.NotAccepted], int(taken.Load()))
	})
}
