// Relays that fall silent or slow: each Send ends when it should, and a late reply is given to no other message.
package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A relay that reads 100 octets a second is slow, but alive: no time limit for a reply runs while its message is being written.
func TestSlowRelayIsNotGivenUpWhileItReads(t *testing.T) {
	for _, extensions := range []string{"250-SIZE 1000000\n250 PIPELINING", "250-SIZE 1000000\n250-PIPELINING\n250 CHUNKING"} {
		synctest.Test(t, func(t *testing.T) {
			var taken relaytest.Octets
			relay := &relaytest.Relay{Body: &taken, Answer: func(_ int, l string) string { return relaytest.Agree(extensions, l) }}
			dial := func(context.Context, string, string) (net.Conn, error) {
				client, server := netpipe.New(200)
				go relay.Serve(slowReader{server}, 1) // ends with the connection
				return client, nil
			}
			ten := 10 * time.Second
			c := bubbleClient(t, smtprelay.Config{
				Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: dial,
				Timeouts: smtprelay.Timeouts{Command: ten, Data: ten, FinalReply: ten, Write: ten},
			})
			for _, size := range []int{10_000, 150_000} {
				m := shortMessage("b@y.example")
				m.Body = smtprelay.Bytes(bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), size/33))
				if _, err := c.Send(t.Context(), m); err != nil {
					t.Errorf("%d octets: %v", size, err)
				}
				m.Body = pieces{bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), size/33), 5000}
				if _, err := c.Send(t.Context(), m); err != nil {
					t.Errorf("%d octets of unknown size: %v", size, err)
				}
			}
			c.Close()
			time.Sleep(time.Minute)
			if n := taken.Load(); n < 300_000 {
				t.Errorf("the relay has %d octets", n)
			}
		})
	}
}

// slowReader reads 100 octets a second.
type slowReader struct{ net.Conn }

func (r slowReader) Read(p []byte) (int, error) {
	time.Sleep(time.Second)
	return r.Conn.Read(p[:min(len(p), 100)])
}

// A relay falls silent at each step in turn, for ever, or until after the caller has given up.
func TestSilentRelayEndsASendInTimeAndHarmsNobodyElse(t *testing.T) {
	limits := smtprelay.Timeouts{ // all different, so that the error shows which one it was; after ten seconds another dial replaces a silent one
		Greeting: 8 * time.Second, TLS: 9 * time.Second, Command: 17 * time.Second, Data: 19 * time.Second,
		Write: 23 * time.Second, FinalReply: 29 * time.Second, Drain: 1, Quit: 3 * time.Second,
	}
	type expected struct {
		op      smtprelay.Op
		after   time.Duration
		outcome smtprelay.Outcome
	}
	const not, unknown = smtprelay.NotAccepted, smtprelay.Unknown
	for _, test := range []struct {
		step             smtptest.Step
		byData, inChunks expected
		why              string
	}{
		{step: smtptest.Connect, byData: expected{smtprelay.OpGreeting, limits.Greeting, not}},
		{step: smtptest.EHLO, byData: expected{smtprelay.OpEHLO, limits.Greeting, not}},
		{step: smtptest.StartTLS, byData: expected{smtprelay.OpSTARTTLS, limits.Greeting, not}},
		{step: smtptest.TLSHandshake, byData: expected{smtprelay.OpTLS, limits.TLS, not}},
		{
			step: smtptest.Mail, byData: expected{smtprelay.OpMail, limits.Command, not}, inChunks: expected{smtprelay.OpEnd, limits.Command, unknown},
			why: "in chunks the message was sent with its envelope: the relay has all of it",
		},
		{
			step: smtptest.Rcpt, byData: expected{smtprelay.OpRcpt, limits.Command, not}, inChunks: expected{smtprelay.OpEnd, limits.Command, unknown},
			why: "the same",
		},
		{
			step: smtptest.Data, byData: expected{smtprelay.OpData, limits.Data, not}, inChunks: expected{smtprelay.OpEnd, limits.Command, unknown},
			why: "the same; in chunks that is BDAT",
		},
		{
			step: smtptest.Body, byData: expected{smtprelay.OpBody, 2 * limits.Write, not}, inChunks: expected{smtprelay.OpBody, 2 * limits.Write, not},
			why: "a full buffer is progress, and restarts the time",
		},
		{step: smtptest.FinalDot, byData: expected{smtprelay.OpEnd, limits.FinalReply, unknown}, inChunks: expected{smtprelay.OpEnd, limits.FinalReply, unknown}},
	} {
		for _, end := range []string{"time-out", "cancel", "deadline"} {
			t.Run(fmt.Sprintf("%v, %s", test.step, end), func(t *testing.T) {
				inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
					relay := newRelay(t, near, func(s *smtptest.Server) {
						s.Buffer = 4096
						s.NoTLS = test.step != smtptest.StartTLS && test.step != smtptest.TLSHandshake
						s.NoAuth = test.step > smtptest.Auth // so that in chunks the whole first message is sent at once
					})
					want := test.byData
					step := test.step
					if relay.Chunking && test.inChunks != (expected{}) {
						want = test.inChunks
					}
					if step == smtptest.Data {
						step = bodyStep(relay)
					}
					cfg := configOf(relay)
					cfg.Limits.MaxConns = 2
					cfg.Retry.MaxAttempts = 1
					cfg.Timeouts = limits
					client := newClient(t, cfg)

					if relay.Chunking && step > smtptest.Auth { // once the relay has answered the probe, the whole message is sent at once
						sendOne(t.Context(), client, 99)
					}
					silent := relay.Fault(smtptest.Fault{At: step, Stall: true})
					ctx, cancel := context.WithCancel(t.Context())
					if end == "deadline" {
						ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
					}
					defer cancel()
					ended := make(chan sent, 1)
					go func() { // ends when Send returns
						m := numbered(0)
						if step == smtptest.Body {
							m.Body = smtprelay.Bytes(make([]byte, 200_000)) // larger than all buffers
						}
						s := sent{began: time.Now()}
						s.receipt, s.err = client.Send(ctx, m)
						s.took = time.Since(s.began)
						ended <- s
					}()
					if err := silent.Wait(t.Context(), 1); err != nil {
						t.Fatal(err)
					}
					synctest.Wait() // until the write side is released: waiting messages then follow on this connection
					var all []sent
					if step > smtptest.Auth || step == smtptest.Auth && !relay.Chunking { // earlier, a connection is not ready, and no other message uses it
						for i := range 5 {
							all = append(all, sendOne(t.Context(), client, 1+i)) // next to it, on another connection
						}
					}
					for _, s := range all {
						if s.err != nil || s.took != 0 {
							t.Errorf("message %d, next to the silent one: %v after %v; want it accepted at once", s.number, s.err, s.took)
						}
					}
					if end == "cancel" {
						time.Sleep(5 * time.Second)
						cancel()
					}
					victim := <-ended
					e := failure(victim.err)
					if e.Outcome != want.outcome {
						t.Errorf("outcome %v, want %v: %s: %v", e.Outcome, want.outcome, test.why, victim.err)
					}
					switch {
					case end == "time-out":
						if e.Op != want.op || !e.Timeout() || errors.Is(victim.err, context.DeadlineExceeded) {
							t.Errorf("%v; want a time-out at %q", victim.err, want.op)
						}
						if victim.took > want.after || victim.took < want.after && !(step == smtptest.Body && e.Op == smtprelay.OpBody) {
							t.Errorf("ended after %v, want %v", victim.took, want.after)
						}
					case end == "cancel" && !errors.Is(victim.err, context.Canceled), end == "deadline" && !errors.Is(victim.err, context.DeadlineExceeded):
						t.Errorf("%v; want the context's error", victim.err)
					case end == "deadline" && !e.Timeout():
						t.Errorf("%v is not a time-out", victim.err)
					case victim.took < 5*time.Second || victim.took > 5*time.Second+limits.Drain:
						t.Errorf("ended after %v, want 5s", victim.took)
					}

					// Then the relay answers again.
					silent.Remove()
					for i := range 5 {
						s := sendOne(t.Context(), client, 10+i)
						if s.err != nil || s.took > limits.Quit {
							t.Errorf("message %d, afterwards: %v after %v", s.number, s.err, s.took)
						}
						all = append(all, s)
					}
					client.Close()
					relay.Close()
					checkLedger(t, relay, append(all, victim))
					atMost(t, "open at once", relay.Stats().MaxOpen, 2)
				})
			})
		}
	}
}

// If a connection does not become ready, another replaces it: the oldest waiter gets the first that is ready.
func TestSilentDialDelaysNoMessage(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		for _, step := range []smtptest.Step{smtptest.Connect, smtptest.EHLO} {
			relay := newRelay(t, near)
			client := newClient(t, configOf(relay))
			silent := relay.Fault(smtptest.Fault{At: step, Stall: true})
			all := sendAtOnce(t.Context(), client, 0, 2)
			for _, s := range all {
				if s.took != 0 {
					t.Errorf("message %d took %v", s.number, s.took)
				}
			}
			want(t, "connections that have fallen silent", silent.Hits(), 1)
			allAccepted(t, relay, all)
		}
	})
}

// If a connection is near its limit of messages, a message waits for it rather than opening another; but not if it falls silent.
func TestSilentConnectionNearItsLimitDelaysNoMessage(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		cfg := configOf(relay)
		cfg.Pipelining = smtprelay.PipelineWithin
		cfg.Limits.MaxMessagesPerConn = 5
		cfg.Timeouts.Drain = 1
		client := newClient(t, cfg)
		for i := range 3 {
			noneFailed(t, sendAtOnce(t.Context(), client, i, 1))
		}
		relay.Fault(smtptest.Fault{At: smtptest.Accepted, Delay: time.Minute})
		var slow sync.WaitGroup
		slow.Go(func() { sendOne(t.Context(), client, 3) })
		synctest.Wait()
		if s := sendOne(t.Context(), client, 4); s.err != nil || s.took < time.Second || s.took > 2*time.Second {
			t.Errorf("took %v (%v), want a second or two of patience", s.took, s.err)
		}
		want(t, "connections", len(relay.Conns()), 2)
		slow.Wait()
	})
}

// All ten connections hang: each Send ends at its own deadline, the slots are released, and traffic resumes when the relay works
// again.
func TestTrafficGoesOnWhenAllConnectionsWereStuck(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		client := newClient(t, configOf(relay))
		all := sendAtOnce(t.Context(), client, 0, 50)
		noneFailed(t, all)
		stuck := relay.Fault(smtptest.Fault{Stall: true, Count: -1})
		const patience = time.Minute
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		waited := sendAtOnce(ctx, client, 100, 50)
		cancel()
		for _, s := range waited {
			if !errors.Is(s.err, context.DeadlineExceeded) || !failure(s.err).Timeout() || s.took < patience || s.took > patience+2*time.Second {
				t.Errorf("message %d: %v after %v; want the deadline after %v", s.number, s.err, s.took, patience)
			}
		}
		stuck.Remove()
		after := sendAtOnce(t.Context(), client, 200, 50)
		noneFailed(t, after)
		for _, s := range after {
			if s.took > 10*time.Second {
				t.Errorf("message %d took %v when the relay was back", s.number, s.took)
			}
		}
		client.Close()
		relay.Close()
		checkLedger(t, relay, append(append(all, waited...), after...))
		atMost(t, "open at once", relay.Stats().MaxOpen, 10)
	})
}

// Unproven credentials are sent on one connection at a time, but a relay that is silent there delays the others for only ten
// seconds.
func TestSilenceAtTheFirstAuthDelaysTheOthersForTenSeconds(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(smtptest.Fault{At: smtptest.Auth, Stall: true})
		all := sendAtOnce(t.Context(), newClient(t, configOf(relay)), 0, 5)
		allAccepted(t, relay, all)
		for _, s := range all {
			if s.took > 10*time.Second {
				t.Errorf("message %d took %v", s.number, s.took)
			}
		}
	})
}
