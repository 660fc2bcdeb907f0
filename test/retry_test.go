// What is retried, how often, after which back-off, and what is not.
package test

import (
	"context"
	"crypto/tls"
	"errors"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A relay that requires another mechanism is a permanent error. A wrong certificate may be an attacker's, who may be gone later.
// Both are reported at once, and not retried.
func TestMistakesOfConfigurationAreNotRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true; s.Mechanisms = []string{"XOAUTH2"} })
		stranger := configOf(relay)
		stranger.TLSConfig = &tls.Config{}
		for i, cfg := range []smtprelay.Config{configOf(relay), stranger} {
			before := len(relay.Conns())
			cfg.Retry.MaxAttempts = -1
			s := sendOne(t.Context(), newClient(t, cfg), 0)
			if e := failure(s.err); e.Temporary() != (i == 1) || e.Outcome != smtprelay.NotAccepted || errors.Is(s.err, context.DeadlineExceeded) {
				t.Errorf("%v; want an error at once, temporary: %t", s.err, i == 1)
			}
			want(t, "connections", len(relay.Conns())-before, 1)
		}
	})
}

// Before the nth dial, a random time is waited, between zero and a limit that doubles up to MaxBackoff: clients that fail
// together do not return together.
func TestBackOffIsRandomUpToALimitThatDoubles(t *testing.T) {
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
			cfg.Retry = smtprelay.Retry{MinBackoff: time.Second, MaxBackoff: 10 * time.Second}
			client := newClient(t, cfg)
			_, err := client.Send(t.Context(), numbered(0))
			dials := nobody.dials()
			if e := failure(err); e.Outcome != smtprelay.NotAccepted || e.Op != smtprelay.OpDial || e.Attempts != len(dials) || !e.Temporary() {
				t.Fatalf("got %v (%d attempts), want a temporary failure to dial after %d", err, e.Attempts, len(dials))
			}
			if len(dials) < attempts {
				t.Fatalf("%d dials in Timeouts.Outage, want %d at least", len(dials), attempts)
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
			// Of 200 uniform times up to the limit, none is in a given fifth of it once in 10^19 runs, and the mean is off the
			// middle by a fifth of the limit once in 10^22.
			if most > limit || most < limit*4/5 || least > limit/5 {
				t.Errorf("waits before dial %d are from %v to %v, want them all over the time up to %v", i+2, least, most, limit)
			}
			if mean := sum / clients; mean < limit*3/10 || mean > limit*7/10 {
				t.Errorf("waits before dial %d are %v on average, want about half of %v", i+2, mean, limit)
			}
		}
	})
}

// A relay that is away is dialled by one connection at a time, however many messages wait; when it is back they are all sent
// within one back-off.
func TestRelayThatIsAwayIsDialledRarelyAndFoundAgain(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		const away, waiting = 10 * time.Minute, 100
		relay := newRelay(t, near)
		back := time.Now().Add(away)
		var nobody noRelay
		cfg := configOf(relay)
		cfg.Timeouts.Outage = -1
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
		// Ten at once, which fail together, and then one after each wait of 15 s on average.
		atMost(t, "failed dials", len(nobody.dials()), 10+120)
		atMost(t, "open at once", relay.Stats().MaxOpen, 10)
	})
}

// By default a temporary refusal is returned to the caller; with Retry.On4xx it is retried. Either way it is not accepted.
func TestTemporaryRefusalsAreRetriedWithOn4xx(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.NoAuth = true })
		for i, step := range []smtptest.Step{smtptest.Mail, smtptest.Rcpt, bodyStep(relay), smtptest.FinalDot} {
			cfg := configOf(relay)
			told := newClient(t, cfg)
			cfg.Retry = smtprelay.Retry{On4xx: true, MinBackoff: time.Minute, MaxBackoff: time.Minute}
			again := newClient(t, cfg)

			busy := relay.Fault(smtptest.Fault{At: step, Reply: "451 4.7.1 come back later"})
			s := sendOne(t.Context(), told, 10*i)
			if e := failure(s.err); e.Reply.Code != 451 || e.Outcome != smtprelay.NotAccepted || !e.Temporary() || e.Attempts != 1 || s.took != 0 {
				t.Errorf("451 at %v, Temporary not set: %v after %v and %d attempts; want the 451 at once", step, s.err, s.took, e.Attempts)
			}
			want(t, "451s", busy.Hits(), 1)

			busy = relay.Fault(smtptest.Fault{At: step, Reply: "451 4.7.1 come back later", Count: 3})
			patient := sendOne(t.Context(), again, 10*i+1)
			if patient.err != nil || patient.took == 0 || patient.took > 3*time.Minute {
				t.Errorf("451 at %v three times, Temporary set: %v after %v; want it accepted within three minutes", step, patient.err, patient.took)
			}
			want(t, "451s", busy.Hits(), 3)

			// At MAIL and DATA some refusals may be about connections that have carried other messages, and cost no attempt.
			busy = relay.Fault(smtptest.Fault{At: step, Reply: "451 4.7.1 come back later", Count: 4 + 3})
			tired := sendOne(t.Context(), again, 10*i+2)
			if e := failure(tired.err); e.Reply.Code != 451 || e.Attempts != 4 || !e.Temporary() || e.Outcome != smtprelay.NotAccepted {
				t.Errorf("451 at %v four times, Temporary set: %v after %d attempts; want the 451 after four", step, tired.err, e.Attempts)
			}
			busy.Remove()

			busy = relay.Fault(smtptest.Fault{At: step, Reply: "550 5.7.1 never"})
			never := sendOne(t.Context(), again, 10*i+3)
			if e := failure(never.err); e.Reply.Code != 550 || e.Temporary() || never.took != 0 {
				t.Errorf("550 at %v, Temporary set: %v after %v; want the 550 at once", step, never.err, never.took)
			}
			want(t, "550s", busy.Hits(), 1)
			checkLedger(t, relay, []sent{s, patient, tired, never})
		}
	})
}

// One recipient is refused temporarily and the other accepted: the second try is only for the first.
func TestTemporaryRefusalOfOneRecipientSendsNothingTwice(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "grey@example.org", Reply: "450 4.2.0 greylisted", Count: 2})
		cfg := configOf(relay)
		cfg.Retry.On4xx = true
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

func TestBackOffStaysAtItsLimitHoweverLongTheRelayIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, r := range []smtprelay.Retry{
			{MinBackoff: 20 * time.Second},
			{MinBackoff: time.Nanosecond, MaxBackoff: time.Hour},
			{MinBackoff: time.Nanosecond, MaxBackoff: math.MaxInt64},
		} {
			var nobody noRelay
			cfg := nobody.config()
			cfg.Retry = r
			cfg.Timeouts.Outage = -1
			ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
			newClient(t, cfg).Send(ctx, numbered(0))
			cancel()
			dials := nobody.dials()
			if len(dials) < 40 {
				t.Errorf("%v: %d dials in a day, want 40 at least", r, len(dials))
			}
			late := dials[len(dials)-10:] // all at the limit; all near zero once in 10^12 runs
			if r.MaxBackoff < math.MaxInt64 && late[9].Sub(late[0]) < max(r.MaxBackoff, 30*time.Second)/4 {
				t.Errorf("%v: the last ten dials are within %v", r, late[9].Sub(late[0]))
			}
		}
	})
}

func TestSendFailsWhereThereIsNoRelayHoweverOftenItIsTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, attempts := range []int{1, 0, 7, -1} {
			var nobody noRelay
			cfg := nobody.config()
			cfg.Retry.MaxAttempts = attempts
			client := newClient(t, cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			for _, s := range sendAtOnce(ctx, client, 0, 20) {
				if s.outcome() != smtprelay.NotAccepted || !contains(s.err, "connection refused") {
					t.Errorf("MaxAttempts %d: %v; want not accepted, with the reason", attempts, s.err)
				}
			}
			cancel()
			if _, err := client.Send(ctx, numbered(0)); err == nil {
				t.Errorf("MaxAttempts %d: no error", attempts)
			}
			if err := client.Ping(ctx); err == nil {
				t.Errorf("MaxAttempts %d: Ping finds nothing wrong", attempts)
			}
		}
	})
}

// A relay always disconnects 15 ms later without a reply: the attempts are bounded, and so is the time while no connection can be
// opened.
func TestRelayThatAlwaysDropsIsGivenUp(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		for _, step := range []smtptest.Step{smtptest.Connect, smtptest.EHLO, smtptest.Auth, smtptest.Mail, smtptest.Rcpt, smtptest.Body} {
			relay := newRelay(t, near)
			relay.Fault(smtptest.Fault{At: step, Delay: 15 * time.Millisecond, Abort: true, Count: -1})
			client := newClient(t, configOf(relay))
			m := numbered(0)
			m.Body = smtprelay.Bytes(make([]byte, 200_000)) // more than can be in flight before the loss
			began := time.Now()
			_, err := client.Send(t.Context(), m)
			e, took, conns := failure(err), time.Since(began), len(relay.Conns())
			if e.Outcome != smtprelay.NotAccepted || !e.Temporary() {
				t.Errorf("dropped at %v: %v; want not accepted, temporary", step, err)
			}
			if step == smtptest.Connect || step == smtptest.EHLO || step == smtptest.Auth { // no connection can be opened
				if took != 2*time.Minute || e.Attempts != conns {
					t.Errorf("dropped at %v: took %v and %d connections, %d attempts reported; want Timeouts.Outage", step, took, conns, e.Attempts)
				}
				atMost(t, "connections", conns, 30)
				continue
			}
			if e.Attempts != 4 {
				t.Errorf("dropped at %v: %v, %d attempts; want not accepted after 4", step, err, e.Attempts)
			}
			atMost(t, "connections, one of which may be lost to commands pipelined after AUTH", conns, 5)
			want(t, "messages at the relay", relay.Stats().Accepted, 0)
		}
	})
}

// A relay that always replies "too many connections" costs a message no attempts at first, but ends it even without a limit on
// the time.
func TestMessageThatAlwaysMeetsTooManyConnectionsIsGivenUp(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		crowd := relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: "432 4.3.2 Concurrent connections limit exceeded", Count: -1})
		cfg := configOf(relay)
		cfg.Timeouts.Outage = smtprelay.NoLimit
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		if s := sendOne(ctx, newClient(t, cfg), 0); s.outcome() != smtprelay.NotAccepted || failure(s.err).Reply.Code != 432 || ctx.Err() != nil {
			t.Errorf("%v after %v, want the 432", s.err, s.took)
		}
		atMost(t, "refusals", crowd.Hits(), 20)
	})
}

func TestMessageIsNotSentTwiceWhenOneRecipientIsAnswered421(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got atomic.Int64
		c := bubbleClient(t, smtprelay.Config{Dial: relaytest.Dial(0, func(n int, l string) string {
			if strings.Contains(l, "<c@") && n == 1 {
				return "421 4.7.28 try c again later"
			}
			if strings.HasPrefix(l, "BDAT") {
				got.Add(1)
				time.Sleep(8 * time.Second)
			}
			return relaytest.Agree("250-PIPELINING\n250-SIZE 1000000\n250 CHUNKING", l)
		})})
		_, err := c.Send(t.Context(), shortMessage("b@y.example", "c@y.example"))
		if n := got.Load(); n > 1 {
			t.Errorf("the relay has it %d times; error: %v", n, err)
		}
		c.Close()
		time.Sleep(time.Minute)
	})
}
