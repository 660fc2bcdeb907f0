// Here belong relays that fall silent or slow: each Send ends when it should, and a reply that comes too late is given to nobody.
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

// A relay that takes 100 octets a second is slow, but moving: no limit for a reply runs while its message is being written.
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
					t.Errorf("%d octets of a size not known: %v", size, err)
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

// A relay falls silent at each step in turn, for ever, or until after the caller has gone.
func TestSilentRelayEndsASendInTimeAndHarmsNobodyElse(t *testing.T) {
	limits := smtprelay.Timeouts{ // each its own, so that it can be told which one it was; a dial of ten seconds is made up for by another one
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
			why: "in chunks the message has left with its envelope: the relay has all of it",
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
			why: "a buffer full is progress, from which the time counts",
		},
		{step: smtptest.FinalDot, byData: expected{smtprelay.OpEnd, limits.FinalReply, unknown}, inChunks: expected{smtprelay.OpEnd, limits.FinalReply, unknown}},
	} {
		for _, end := range []string{"time-out", "cancel", "deadline"} {
			t.Run(fmt.Sprintf("%v, %s", test.step, end), func(t *testing.T) {
				inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
					relay := newRelay(t, near, func(s *smtptest.Server) {
						s.Buffer = 4096
						s.NoTLS = test.step != smtptest.StartTLS && test.step != smtptest.TLSHandshake
						s.NoAuth = test.step > smtptest.Auth // so that in chunks all of the first message leaves at once
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

					if relay.Chunking && step > smtptest.Auth { // once the relay has shown itself all of a message leaves at once
						sendOne(t.Context(), client, 99)
					}
					silent := relay.Fault(smtptest.Fault{At: step, Stall: true})
					ctx, cancel := context.WithCancel(t.Context())
					if end == "deadline" {
						ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
					}
					defer cancel()
					ended := make(chan sent, 1)
					go func() { // until Send returns, which is waited for below
						m := numbered(0)
						if step == smtptest.Body {
							m.Body = smtprelay.Bytes(make([]byte, 200_000)) // more than all buffers hold
						}
						s := sent{began: time.Now()}
						s.receipt, s.err = client.Send(ctx, m)
						s.took = time.Since(s.began)
						ended <- s
					}()
					if err := silent.Wait(t.Context(), 1); err != nil {
						t.Fatal(err)
					}
					synctest.Wait() // until the write side is given back: whoever waits by then goes on behind
					var all []sent
					if step > smtptest.Auth || step == smtptest.Auth && !relay.Chunking { // before, nobody would stay with a connection that is not ready
						for i := range 5 {
							all = append(all, sendOne(t.Context(), client, 1+i)) // next to it, on a connection of their own
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
						t.Errorf("%v is no time-out", victim.err)
					case victim.took < 5*time.Second || victim.took > 5*time.Second+limits.Drain:
						t.Errorf("ended after %v, want 5s", victim.took)
					}

					// Then the relay finds its voice again.
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

// A connection that does not get ready is made up for by the next one: whoever waits longest gets what is ready first.
func TestSilentDialHoldsUpNobody(t *testing.T) {
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

// A connection that is near its limit of messages is waited for, rather than opening one more; but not if it falls silent.
func TestSilentConnectionNearItsEndHoldsUpNobody(t *testing.T) {
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

// All ten connections are stuck: each Send ends at its own deadline, the places come back, and traffic goes on with the
// relay.
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

// Credentials that are not known to be right go out on one connection at a time, but a relay that is silent there holds the
// others up for ten seconds only.
func TestSilenceAtTheFirstAuthHoldsTheOthersUpForTenSeconds(t *testing.T) {
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
