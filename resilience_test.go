package smtprelay_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// These tests are about what goes wrong with relay and network: that what can be sent is sent, that nothing is sent twice,
// and that each Send ends when it should. Time is that of a synctest bubble, so that it can be compared to the nanosecond.

// inBothModes runs a test in a bubble of its own with a relay that takes bodies by DATA, and again with one that takes them
// in chunks. near sets up a relay of the kind, in memory and without TLS.
func inBothModes(t *testing.T, f func(t *testing.T, near func(*smtptest.Server))) {
	t.Helper()
	for _, chunking := range []bool{false, true} {
		name := map[bool]string{false: "by DATA", true: "in chunks"}[chunking]
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f(t, func(s *smtptest.Server) {
					s.InMemory, s.NoTLS, s.Chunking = true, true, chunking
				})
			})
		})
	}
}

// unknownOf counts those of unknown fate among all, of whom the others must have been accepted.
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

// bodyStep is the step at which the relay is asked to take a body.
func bodyStep(relay *smtptest.Server) smtptest.Step {
	if relay.Chunking {
		return smtptest.Bdat
	}
	return smtptest.Data
}

// sent is what became of a message.
type sent struct {
	number  int
	receipt smtprelay.Receipt
	err     error
	began   time.Time
	took    time.Duration
}

func (s sent) outcome() smtprelay.Outcome {
	if s.err == nil {
		return smtprelay.Accepted
	}
	return failure(s.err).Outcome
}

// failure returns err as the *Error that it must be.
func failure(err error) *smtprelay.Error {
	e, ok := errors.AsType[*smtprelay.Error](err)
	if !ok {
		return &smtprelay.Error{Op: "no *Error", Err: err}
	}
	return e
}

// sendAtOnce sends the messages with numbers from first on, n of them, all at the same time, and returns what became of
// them, in their order.
func sendAtOnce(ctx context.Context, client *smtprelay.Client, first, n int) []sent {
	results := make([]sent, n)
	var senders sync.WaitGroup
	for i := range n {
		senders.Go(func() { results[i] = sendOne(ctx, client, first+i) })
	}
	senders.Wait()
	return results
}

func sendOne(ctx context.Context, client *smtprelay.Client, number int) sent {
	s := sent{number: number, began: time.Now()}
	s.receipt, s.err = client.Send(ctx, numbered(number))
	s.took = time.Since(s.began)
	return s
}

// checkLedger holds what the callers were told against what the relay has: each message that was accepted is there once,
// under the queue ID of its receipt; none that was not accepted is; of those whose fate is unknown there is one copy at most.
func checkLedger(t *testing.T, relay *smtptest.Server, results []sent) {
	t.Helper()
	ids := map[string][]string{}
	for _, m := range relay.Messages() {
		ids[m.To[0]] = append(ids[m.To[0]], m.ID)
	}
	accepted := 0
	for _, s := range results {
		got := ids[numbered(s.number).To[0]]
		switch s.outcome() {
		case smtprelay.Accepted:
			accepted++
			if len(got) != 1 || got[0] != s.receipt.QueueID {
				t.Errorf("message %d was accepted as %q; the relay has it as %q", s.number, s.receipt.QueueID, got)
			}
		case smtprelay.NotAccepted:
			if len(got) != 0 {
				t.Errorf("message %d was not accepted (%v); the relay has it as %q", s.number, s.err, got)
			}
		default:
			if len(got) > 1 {
				t.Errorf("message %d, whose fate is unknown, is at the relay %d times", s.number, len(got))
			}
		}
	}
	if accepted > relay.Accepted() {
		t.Errorf("%d messages were accepted; the relay has %d", accepted, relay.Accepted())
	}
	want(t, "duplicates", relay.Duplicates(), 0)
}

// allAccepted fails the test for each message that was not accepted, and checks the ledger.
func allAccepted(t *testing.T, relay *smtptest.Server, results []sent) {
	t.Helper()
	noneFailed(t, results)
	checkLedger(t, relay, results)
}

func noneFailed(t *testing.T, results []sent) {
	t.Helper()
	for _, s := range results {
		if s.err != nil {
			t.Errorf("message %d: %v", s.number, s.err)
		}
	}
}

// noRelay is a Dial that fails, and remembers when it was asked.
type noRelay struct {
	mu    sync.Mutex // guards the field below
	times []time.Time
}

func (n *noRelay) Dial(context.Context, string, string) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.times = append(n.times, time.Now())
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
}

func (n *noRelay) dials() []time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.times
}

func (n *noRelay) config() smtprelay.Config {
	return smtprelay.Config{Addr: "relay.example:25", TLS: smtprelay.TLSNone, LocalName: "client.example", Dial: n.Dial}
}

// The wait before the nth dial is any time between nothing and a limit that doubles up to MaxBackoff: nobody who fails
// together with others comes back together with them.
func TestBackOffIsARandomPartOfATimeThatDoublesUpToItsCap(t *testing.T) {
	const (
		clients  = 200
		attempts = 8
	)
	synctest.Test(t, func(t *testing.T) {
		limits := []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 10 * time.Second, 10 * time.Second, 10 * time.Second}
		waits := make([][]time.Duration, len(limits))
		for range clients {
			var nobody noRelay
			cfg := nobody.config()
			cfg.Retry = smtprelay.Retry{MaxAttempts: attempts, MinBackoff: time.Second, MaxBackoff: 10 * time.Second}
			client := newClient(t, cfg)
			_, err := client.Send(t.Context(), numbered(0))
			if e := failure(err); e.Outcome != smtprelay.NotAccepted || e.Op != smtprelay.OpDial || e.Attempts != attempts || !e.Temporary() {
				t.Fatalf("got %v (%d attempts), want a temporary failure to dial after %d", err, e.Attempts, attempts)
			}
			dials := nobody.dials()
			if len(dials) != attempts {
				t.Fatalf("%d dials, want %d", len(dials), attempts)
			}
			for i := range limits {
				waits[i] = append(waits[i], dials[i+1].Sub(dials[i]))
			}
		}
		for i, limit := range limits {
			least, most, sum := limit, time.Duration(0), time.Duration(0)
			for _, w := range waits[i] {
				least, most, sum = min(least, w), max(most, w), sum+w
			}
			// Of 200 times that are uniform up to the limit, none is in a given fifth of it once in 10^19 runs, and the mean is
			// off the middle by a fifth of the limit once in 10^22.
			if most > limit || most < limit*4/5 || least > limit/5 {
				t.Errorf("waits before dial %d are from %v to %v, want them all over the time up to %v", i+2, least, most, limit)
			}
			if mean := sum / clients; mean < limit*3/10 || mean > limit*7/10 {
				t.Errorf("waits before dial %d are %v in the mean, want about half of %v", i+2, mean, limit)
			}
		}
	})
}

func TestContextIsTheBudgetOfAllTries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var nobody noRelay
		cfg := nobody.config()
		cfg.Retry.MaxAttempts = -1
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
				t.Errorf("%q does not say why there was no connection", s.err)
			}
		}
	})
}

// A relay that is away is asked by one connection at a time, however many messages wait; and when it is back they are all
// sent within one back-off.
func TestRelayThatIsAwayIsNotHammeredAndFoundAgain(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		const away, waiting = 10 * time.Minute, 100
		relay := newRelay(t, near)
		back := time.Now().Add(away)
		var nobody noRelay
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = -1
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if time.Now().Before(back) {
				return nobody.Dial(ctx, network, addr)
			}
			return relay.Dial(ctx, network, addr)
		}
		client := newClient(t, cfg)
		results := sendAtOnce(t.Context(), client, 0, waiting)
		allAccepted(t, relay, results)
		for _, s := range results {
			if s.took < away || s.took > away+30*time.Second {
				t.Errorf("message %d took %v, want no more than the longest back-off beyond %v", s.number, s.took, away)
			}
		}
		// Ten at once, which fail together, and then one behind each wait of 15 s in the mean.
		atMost(t, "dials in vain", len(nobody.dials()), 10+120)
		atMost(t, "open at once", relay.MaxOpen(), 10)
	})
}

// A burst opens many connections at once. If none of them succeeds, that is one attempt of those who wait, and not ten.
func TestDialsThatFailTogetherAreOneAttempt(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		back := time.Now().Add(time.Second)
		var nobody noRelay
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = 2
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if time.Now().Before(back) {
				time.Sleep(time.Until(back))
				return nobody.Dial(ctx, network, addr)
			}
			return relay.Dial(ctx, network, addr)
		}
		client := newClient(t, cfg)
		allAccepted(t, relay, sendAtOnce(t.Context(), client, 0, 10))
		want(t, "dials in vain", len(nobody.dials()), 10)
	})
}

// What the relay refuses for now is the caller's to decide, unless Retry.Temporary hands that over; and either way it is
// known to be not accepted.
func TestTemporaryRefusalsAreTriedAgainIfRetrySaysSo(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		for i, step := range []smtptest.Step{smtptest.Mail, smtptest.Rcpt, bodyStep(relay), smtptest.FinalDot} {
			cfg := configOf(relay)
			told := newClient(t, cfg)
			cfg.Retry = smtprelay.Retry{Temporary: true, MinBackoff: time.Minute, MaxBackoff: time.Minute}
			again := newClient(t, cfg)

			busy := relay.Fault(smtptest.Fault{At: step, Reply: "451 4.7.1 come back later"})
			s := sendOne(t.Context(), told, 10*i)
			if e := failure(s.err); e.Code != 451 || e.Outcome != smtprelay.NotAccepted || !e.Temporary() || e.Attempts != 1 || s.took != 0 {
				t.Errorf("451 at %v, Temporary not set: %v after %v and %d attempts; want the 451 at once", step, s.err, s.took, e.Attempts)
			}
			want(t, "451s", busy.Hits(), 1)

			busy = relay.Fault(smtptest.Fault{At: step, Reply: "451 4.7.1 come back later", Count: 3})
			patient := sendOne(t.Context(), again, 10*i+1)
			if patient.err != nil || patient.took == 0 || patient.took > 3*time.Minute {
				t.Errorf("451 at %v three times, Temporary set: %v after %v; want it accepted within three minutes", step, patient.err, patient.took)
			}
			want(t, "451s", busy.Hits(), 3)

			busy = relay.Fault(smtptest.Fault{At: step, Reply: "451 4.7.1 come back later", Count: 4})
			tired := sendOne(t.Context(), again, 10*i+2)
			if e := failure(tired.err); e.Code != 451 || e.Attempts != 4 || !e.Temporary() || e.Outcome != smtprelay.NotAccepted {
				t.Errorf("451 at %v four times, Temporary set: %v after %d attempts; want the 451 after four", step, tired.err, e.Attempts)
			}
			busy.Remove()

			busy = relay.Fault(smtptest.Fault{At: step, Reply: "550 5.7.1 never"})
			never := sendOne(t.Context(), again, 10*i+3)
			if e := failure(never.err); e.Code != 550 || e.Temporary() || never.took != 0 {
				t.Errorf("550 at %v, Temporary set: %v after %v; want the 550 at once", step, never.err, never.took)
			}
			want(t, "550s", busy.Hits(), 1)
			checkLedger(t, relay, []sent{s, patient, tired, never})
		}
	})
}

// One recipient is refused for now and the other accepted: the second try is for the first alone.
func TestTemporaryRefusalOfOneRecipientSendsNothingTwice(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "grey@example.org", Reply: "450 4.2.0 greylisted", Count: 2})
		cfg := configOf(relay)
		cfg.Retry.Temporary = true
		client := newClient(t, cfg)
		m := numbered(0)
		m.To = []string{"ann@example.org", "grey@example.org", "bob@example.org"}
		receipt, err := client.Send(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		copies := map[string]int{}
		for _, m := range relay.Messages() {
			for _, to := range m.To {
				copies[to]++
			}
		}
		for i, r := range receipt.Recipients {
			if r.To != m.To[i] || r.Outcome != smtprelay.Accepted || copies[r.To] != 1 {
				t.Errorf("recipient %s: %v, %d copies; want accepted, 1", r.To, r.Outcome, copies[r.To])
			}
		}
	})
}

// A connection can be lost in many ways, at any step. All of them are one thing: before the end of the message it goes to
// another connection, and behind it nobody knows.
func TestConnectionLostInAnyFormIsOneThing(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Buffer = 4096 })
		forms := []struct {
			name string
			smtptest.Fault
		}{
			{"EOF", smtptest.Fault{Drop: true}},
			{"RST", smtptest.Fault{Reset: true}},
			{"421", smtptest.Fault{Reply: "421 4.3.2 going down"}},
			{"421 and EOF", smtptest.Fault{Reply: "421 4.3.2 going down", Drop: true}},
			{"421 and RST", smtptest.Fault{Reply: "421 4.3.2 going down", Reset: true}},
		}
		steps := []smtptest.Step{
			smtptest.Connect, smtptest.EHLO, smtptest.Auth, smtptest.Mail, smtptest.Rcpt, bodyStep(relay), smtptest.Body, smtptest.FinalDot,
		}
		number := 0
		for _, step := range steps {
			for _, form := range forms {
				if step == smtptest.FinalDot && form.Reply == "" {
					continue // unknown, for which there are scripts
				}
				for _, used := range []bool{false, true} { // whether the connection has carried a message before
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
					m.Body = &generator{size: 100_000, failAt: -1} // more than fits into all buffers
					_, err := client.Send(t.Context(), m)
					want(t, name+": hits", h.Hits(), 1)
					s := client.Stats()
					// A reset may destroy the 421 on its way. And a relay that closes in order, and goes on reading, may let all of
					// the message leave before the client has seen the end: then nobody knows what it has made of it.
					mayBeUnknown := form.Reset && step == smtptest.FinalDot ||
						form.name == "EOF" && (step == smtptest.Body || relay.Chunking && step >= smtptest.Auth)
					if err != nil && !(mayBeUnknown && failure(err).Outcome == smtprelay.Unknown) {
						t.Errorf("%s: %v", name, err)
					} else if err == nil && (s.Accepted != int64(1+before) || s.Retries > 1) {
						t.Errorf("%s: %d accepted, %d tries more; want one more", name, s.Accepted, s.Retries)
					}
					if err := client.Close(); err != nil {
						t.Error(err)
					}
					synctest.Wait()
					want(t, name+": connections open", relay.Open(), 0)
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

// The network goes away for a while, in the middle of traffic, in both of its ways: so that everybody notices, and so that
// nobody does.
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

		// A trickle of messages all the time: 20 at once, every five seconds.
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
		stall := relay.Fault(smtptest.Fault{Stall: true, Count: -1}) // like a cable pulled out: nothing moves, nobody is told
		time.Sleep(time.Minute)
		stall.Remove()
		senders.Wait()

		unknown := unknownOf(t, all)
		want(t, "sends that have ended", len(all), 20*bursts)
		// Those whose dot was out when all connections were reset: one on each of ten, with CHUNKING four.
		atMost(t, "messages of unknown fate", unknown, 10*4)
		checkLedger(t, relay, all)
	})
}

func contains(err error, words string) bool {
	return err != nil && strings.Contains(err.Error(), words)
}

func TestBackOffStaysAtItsCapHoweverLongTheRelayIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, r := range []smtprelay.Retry{
			{MinBackoff: 20 * time.Second},
			{MinBackoff: time.Nanosecond, MaxBackoff: time.Hour},
			{MinBackoff: time.Nanosecond, MaxBackoff: math.MaxInt64},
		} {
			var nobody noRelay
			cfg := nobody.config()
			cfg.Retry = r
			cfg.Retry.MaxAttempts = 60
			ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
			newClient(t, cfg).Send(ctx, numbered(0))
			cancel()
			dials := nobody.dials()
			if len(dials) < 40 {
				t.Errorf("%v: %d dials in a day, want 40 at least", r, len(dials))
			}
			late := dials[len(dials)-10:] // all at the cap, and together at nothing once in 10^12 runs
			if r.MaxBackoff < math.MaxInt64 && late[9].Sub(late[0]) < max(r.MaxBackoff, 30*time.Second)/4 {
				t.Errorf("%v: the last ten dials are within %v", r, late[9].Sub(late[0]))
			}
		}
	})
}
