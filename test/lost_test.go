// Connections and networks that are lost: what can be sent is sent, and nothing is sent twice.
package test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// unknownOf counts the unknown results of all; the others must have been accepted.
func unknownOf(t *testing.T, all []sent) (n int) {
	t.Helper()
	for _, s := range all {
		switch s.outcome() {
		case smtprelay.Unknown:
			n++
		case smtprelay.NotAccepted:
			t.Errorf("message %d: %v", s.number, s.err)
		}
	}
	return n
}

// A connection can be lost in many ways, at any step. The result is the same: before the end of the message it is sent on another
// connection, after the end its outcome is unknown.
func TestConnectionLostInAnyFormIsOneThing(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Buffer = 4096 })
		forms := []struct {
			name string
			smtptest.Fault
		}{
			{"EOF", smtptest.Fault{Drop: true}},
			{"RST", smtptest.Fault{Abort: true}},
			{"421", smtptest.Fault{Reply: "421 4.3.2 going down"}},
			{"421 and EOF", smtptest.Fault{Reply: "421 4.3.2 going down", Drop: true}},
			{"421 and RST", smtptest.Fault{Reply: "421 4.3.2 going down", Abort: true}},
		}
		steps := []smtptest.Step{
			smtptest.Connect, smtptest.EHLO, smtptest.Auth, smtptest.Mail, smtptest.Rcpt, bodyStep(relay), smtptest.Body, smtptest.FinalDot,
		}
		number := 0
		for _, step := range steps {
			for _, form := range forms {
				if step == smtptest.FinalDot && form.Reply == "" {
					continue // unknown; scripts test this
				}
				for _, used := range []bool{false, true} { // whether the connection has carried an earlier message
					name := fmt.Sprintf("%s at %v, used before: %t", form.name, step, used)
					client := newClient(t, configOf(relay))
					before := 0
					if used {
						if step < smtptest.Mail {
							continue
						}
						sendNumbered(t, client, 1, 1)
						before = 1
					}
					number++
					fault := form.Fault
					fault.At = step
					if step == smtptest.Body {
						fault.AfterBytes = 10_000
					}
					h := relay.Fault(fault)
					m := numbered(number)
					m.Body = pieces{bytes.Repeat([]byte("0123456789abcdef0123456789abcde\r\n"), 3000), 5000} // larger than all buffers
					_, err := client.Send(t.Context(), m)
					want(t, name+": hits", h.Hits(), 1)
					s := client.Stats()
					// A reset may destroy the 421. And a relay that closes gracefully, and keeps reading, may let the client send
					// the whole message before it notices: then its outcome is unknown.
					mayBeUnknown := form.Abort && step == smtptest.FinalDot ||
						form.name == "EOF" && (step == smtptest.Body || relay.Chunking && step >= smtptest.Auth)
					if err != nil && !(mayBeUnknown && failure(err).Outcome == smtprelay.Unknown) {
						t.Errorf("%s: %v", name, err)
					} else if err == nil && (s.Accepted != int64(1+before) || s.Retries > 1) {
						t.Errorf("%s: %d accepted, %d retries; want one", name, s.Accepted, s.Retries)
					}
					if err := client.Close(); err != nil {
						t.Error(err)
					}
					synctest.Wait()
					want(t, name+": connections open", relay.Stats().Open, 0)
				}
			}
		}
		copies := map[string]int{}
		for _, m := range relay.Messages() {
			copies[m.To[0]]++
		}
		for i := 1; i <= number; i++ {
			atMost(t, fmt.Sprintf("copies of message %d", i), copies[numbered(i).To[0]], 1)
		}
	})
}

// The network is interrupted in the middle of traffic, in both ways: noticed by all connections, and noticed by none.
func TestNetworkThatGoesAwayAndComesBackCostsNoMessage(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		var away atomic.Bool
		var nobody noRelay
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = -1
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if away.Load() {
				return nobody.Dial(ctx, network, addr)
			}
			return relay.Dial(ctx, network, addr)
		}
		client := newClient(t, cfg)

		// Continuous traffic: 20 messages at once, every five seconds.
		var all []sent
		var mu sync.Mutex // guards all
		var senders sync.WaitGroup
		const bursts = 50
		for burst := range bursts {
			senders.Go(func() {
				time.Sleep(time.Duration(burst) * 5 * time.Second)
				results := sendAtOnce(t.Context(), client, 20*burst, 20)
				mu.Lock()
				all = append(all, results...)
				mu.Unlock()
			})
		}
		time.Sleep(30*time.Second + 15*time.Millisecond) // in the middle of a burst
		away.Store(true)
		relay.CloseClientConnections()
		time.Sleep(time.Minute)
		away.Store(false)
		time.Sleep(30*time.Second + 15*time.Millisecond)
		stall := relay.Fault(smtptest.Fault{Stall: true, Count: -1}) // like an unplugged cable: nothing moves, and neither side notices
		time.Sleep(time.Minute)
		stall.Remove()
		senders.Wait()

		unknown := unknownOf(t, all)
		want(t, "sends that have ended", len(all), 20*bursts)
		// Those whose dot had been sent when all connections were reset: one on each of ten, with CHUNKING four.
		atMost(t, "unknown messages", unknown, 10*4)
		checkLedger(t, relay, all)
	})
}

// Fifty messages wait for the only connection, which is lost repeatedly: the next dial serves them at once.
func TestWaitersAreServedWhenTheOnlyConnectionDies(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		cfg := configOf(relay)
		cfg.Limits.MaxConns = 1
		client := newClient(t, cfg)
		done := make(chan []sent)
		go func() { done <- sendAtOnce(t.Context(), client, 0, 50) }() // ends when all have been sent
		const kills = 5
		for range kills {
			time.Sleep(150 * time.Millisecond)
			relay.CloseClientConnections()
		}
		all := <-done
		unknown := unknownOf(t, all)
		for _, s := range all {
			// 50 messages at a round trip each, five dials of four round trips, and a back-off of half a second after each loss.
			if s.took > 50*20*time.Millisecond+kills*(80+500)*time.Millisecond {
				t.Errorf("message %d took %v", s.number, s.took)
			}
		}
		atMost(t, "unknown messages", unknown, kills*4)
		checkLedger(t, relay, all)
		atMost(t, "open at once", relay.Stats().MaxOpen, 1)
	})
}

// The message uses up the connection, and no other can be opened: the message is not affected.
func TestFailedDialBehindTheLastMessageOfAConnectionCostsNoReceipt(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		var dials atomic.Int64
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = 2
		cfg.Limits.MaxConns = 1
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials.Add(1) > 1 {
				return nil, syscall.ECONNREFUSED
			}
			return relay.Dial(ctx, network, addr)
		}
		client := newClient(t, cfg)
		var all []sent
		for i := range 100 {
			all = append(all, sendOne(t.Context(), client, i))
		}
		allAccepted(t, relay, all)
		if s := sendOne(t.Context(), client, 100); s.outcome() != smtprelay.NotAccepted {
			t.Errorf("the 101st: %v; want not accepted", s.err)
		}
	})
}
