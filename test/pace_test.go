// Here belong relays that take so many messages a second: the pace that a Client finds out, or is told, and what that costs.
package test

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

const tooFast = "454 Throttling failure: Maximum sending rate exceeded."

// hurried has so many senders send n messages together, each one after another.
func hurried(t *testing.T, clients []*smtprelay.Client, n, senders int) (all []sent) {
	all = make([]sent, n)
	numbers := make(chan int, n)
	for i := range n {
		numbers <- i
	}
	close(numbers)
	var running sync.WaitGroup
	for s := range senders {
		running.Go(func() {
			for i := range numbers {
				all[i] = sendOne(t.Context(), clients[s%len(clients)], i)
			}
		})
	}
	running.Wait()
	return all
}

// A relay that limits the rate gets all messages at nearly that rate, and has to refuse few.
func TestPaceOfTheRelayIsFoundOut(t *testing.T) {
	for _, rate := range []int{2, 14, 200} {
		for _, at := range []smtptest.Step{smtptest.FinalDot, smtptest.Mail, smtptest.Rcpt} {
			for _, clients := range []int{1, 2} {
				if clients == 2 && rate != 14 {
					continue
				}
				t.Run(fmt.Sprintf("%d a second, %v, %d clients", rate, at, clients), func(t *testing.T) {
					inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
						relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxConns, s.Delay = 20, 5*time.Millisecond })
						limit := relay.Fault(smtptest.Fault{At: at, Rate: float64(rate), Burst: rate, Reply: tooFast, Count: -1})
						var all []*smtprelay.Client
						for range clients {
							all = append(all, newClient(t, configOf(relay)))
						}
						const messages = 500
						began := time.Now()
						sent := hurried(t, all, messages, 100)
						took := time.Since(began)
						allAccepted(t, relay, sent)
						ideal := time.Duration(float64(messages-rate) / float64(rate) * float64(time.Second))
						share := float64(ideal) / float64(took)
						t.Logf("%v of the ideal %v: %.1f%%, %d refused", took, ideal, 100*share, limit.Hits())
						// What is under way at first: of each Client two messages on each of ten connections, and a third
						// at the final dot of DATA, which the reply to the first lets begin.
						underWay := 20 * clients
						if at == smtptest.FinalDot {
							underWay = 30 * clients
						}
						least, refused := 0.95, max(rate, underWay)+messages*5/100
						if clients == 2 {
							least = 0.80 // unequal shares: one Client may end before the other
						}
						if share < least {
							t.Errorf("took %v, which is %.1f%% of the ideal rate", took, 100*share)
						}
						atMost(t, "refused", limit.Hits(), refused)
					})
				})
			}
		}
	}
}

// Limits.Rate is kept from the start: the relay has nothing to refuse.
func TestRateThatIsSetIsKeptFromTheStart(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		limit := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Rate: 14, Burst: 14, Reply: tooFast, Count: -1})
		cfg := configOf(relay)
		cfg.Limits.Rate = 14
		began := time.Now()
		all := hurried(t, []*smtprelay.Client{newClient(t, cfg)}, 300, 100)
		allAccepted(t, relay, all)
		if took := time.Since(began); took < 20*time.Second || took > 22500*time.Millisecond {
			t.Errorf("300 messages at 14 a second took %v", took)
		}
		atMost(t, "refused", limit.Hits(), 0)
	})
}

// Where Limits.Rate is negative the caller is told what the relay says.
func TestRateThatIsOffTellsTheCaller(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: tooFast})
		cfg := configOf(relay)
		cfg.Limits.Rate = smtprelay.NoLimit
		if s := sendOne(t.Context(), newClient(t, cfg), 0); failure(s.err).Reply.Code != 454 || s.took != 0 {
			t.Errorf("%v after %v; want the 454 at once", s.err, s.took)
		}
	})
}

// A relay limits one sender, and no other: his message comes to its end, and the others do not wait for it.
func TestMessageThatIsAlwaysTooFastHoldsUpNobody(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		limit := relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: "450 4.7.1 Sender rate exceeded", Count: -1, When: func(e smtptest.Event) bool { return e.From == "busy@example.com" }})
		client := newClient(t, configOf(relay))
		noneFailed(t, sendAtOnce(t.Context(), client, 0, 20))
		var busy sent
		var running sync.WaitGroup
		running.Go(func() {
			m := numbered(1_000_000)
			m.From = "busy@example.com"
			began := time.Now()
			_, busy.err = client.Send(t.Context(), m)
			busy.took = time.Since(began)
		})
		for i := range 600 { // five a second
			running.Go(func() {
				if s := sendOne(t.Context(), client, 100+i); s.err != nil || s.took > 3*time.Second {
					t.Errorf("message %d: %v after %v", i, s.err, s.took)
				}
			})
			time.Sleep(200 * time.Millisecond)
		}
		running.Wait()
		if failure(busy.err).Reply.Code != 450 || busy.took > 5*time.Minute {
			t.Errorf("%v after %v; want the 450 in time", busy.err, busy.took)
		}
		t.Logf("%d refusals in %v", limit.Hits(), busy.took)
	})
}

// A relay that has said "too fast" to all for Timeouts.Outage is not waited for any longer.
func TestRelayThatIsAlwaysTooSlowEndsASendInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
		limit := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: tooFast, Count: -1})
		for _, s := range sendAtOnce(t.Context(), newClient(t, configOf(relay)), 0, 30) {
			if failure(s.err).Reply.Code != 454 || s.took > 5*time.Minute {
				t.Errorf("%v after %v", s.err, s.took)
			}
		}
		atMost(t, "bodies in vain", limit.Hits(), 300)
	})
}
