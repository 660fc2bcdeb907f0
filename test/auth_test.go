// Here belongs AUTH: refused credentials and how long they are not tried again, mechanisms that misbehave.
package test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// observed remembers when the events passed that a fault observes.
type observed struct {
	mu    sync.Mutex // guards the field below
	times []time.Time
}

func observe(relay *smtptest.Server, step smtptest.Step) *observed {
	o := &observed{}
	relay.Fault(smtptest.Fault{At: step, Count: -1, When: func(smtptest.Event) bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.times = append(o.times, time.Now())
		return false
	}})
	return o
}

func (o *observed) all() []time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.times)
}

// One AUTH for each period, which grows: some relays lock the account of somebody who goes on trying. In between every
// Send fails at once, with what the relay said.
func TestRefusedCredentialsAreNotTriedAgainForAWhile(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		auths := observe(relay, smtptest.Auth)
		cfg := configOf(relay)
		cfg.Password = "revoked"
		client := newClient(t, cfg)
		const period = 10 * time.Minute
		began := time.Now()
		check := func(results []sent) {
			for _, s := range results {
				e := failure(s.err)
				if e.Op != smtprelay.OpAuth || e.Reply.Code != 535 || e.Temporary() || e.Outcome != smtprelay.NotAccepted || s.took != 0 {
					t.Fatalf("message %d after %v: %v, after %v; want the relay's 535 at once", s.number, time.Since(began), s.err, s.took)
				}
			}
		}
		check(sendAtOnce(t.Context(), client, 0, 50))
		for i := range int(period / time.Second) {
			time.Sleep(time.Second)
			check(sendAtOnce(t.Context(), client, 50+i, 1))
		}
		times := auths.all()
		// The first burst opens ten connections, and one of them authenticates.
		first := slices.IndexFunc(times, func(at time.Time) bool { return !at.Equal(began) })
		if first != 1 {
			t.Fatalf("AUTH at %v", times)
		}
		last := began
		for i, at := range times[first:] {
			if pause := at.Sub(last); pause < 30*time.Second || pause > 5*time.Minute+time.Second {
				t.Errorf("the pause before AUTH %d was %v, want half a minute to five", first+i+1, pause)
			}
			last = at
		}
		// After 30 s, 1 min, 2, 4 and 5: three and a part of them in ten minutes.
		atMost(t, "AUTHs after the first burst", len(times)-first, 4)
		if len(times) == first {
			t.Error("the credentials were never tried again")
		}
		want(t, "messages at the relay", relay.Stats().Accepted, 0)
		want(t, "bodies that left nevertheless", commands(relay, "BDAT"), 0)
	})
}

// With the right key again all goes on: at once with a new one from Config.Auth, and after the pause when the account is
// repaired at the relay.
func TestPauseOfTheCredentialsEnds(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		auths := observe(relay, smtptest.Auth)
		var key atomic.Value
		key.Store("old key")
		cfg := configOf(relay)
		username, good := cfg.Username, cfg.Password
		cfg.Username, cfg.Password = "", ""
		cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
			return sasl.NewPlainClient("", username, key.Load().(string)), nil
		}
		client := newClient(t, cfg)
		began := time.Now()
		for i := range 20 { // the same key again and again: AUTH goes out once
			s := sendOne(t.Context(), client, i)
			if e := failure(s.err); e.Reply.Code != 535 || s.took > 30*time.Second {
				t.Fatalf("with the old key: %v after %v; want the 535 once Config.Auth was asked", s.err, s.took)
			}
			time.Sleep(time.Second)
		}
		atMost(t, "AUTHs with the old key", len(auths.all()), 1+int(time.Since(began)/(30*time.Second)))
		key.Store(good)
		time.Sleep(30 * time.Second) // the longest back-off
		if s := sendOne(t.Context(), client, 100); s.err != nil || s.took != 0 {
			t.Errorf("with the new key: %v after %v", s.err, s.took)
		}

		// And the key that was refused may be the right one again.
		broken := relay.Fault(smtptest.Fault{At: smtptest.Auth, Reply: "535 5.7.8 account suspended"})
		cfg = configOf(relay)
		client = newClient(t, cfg)
		if s := sendOne(t.Context(), client, 101); failure(s.err).Reply.Code != 535 {
			t.Errorf("suspended: %v", s.err)
		}
		want(t, "535s", broken.Hits(), 1)
		time.Sleep(29 * time.Second)
		if s := sendOne(t.Context(), client, 102); failure(s.err).Reply.Code != 535 || s.took != 0 {
			t.Errorf("in the pause: %v after %v; want the 535 at once", s.err, s.took)
		}
		time.Sleep(time.Second)
		if s := sendOne(t.Context(), client, 103); s.err != nil {
			t.Errorf("after the pause: %v", s.err)
		}
	})
}

func TestChallengesWithoutEndAreGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var answers atomic.Int64
		client := newClient(t, smtprelay.Config{
			Addr: "relay.example:25", TLS: smtprelay.TLSNone, AllowInsecureAuth: true, Retry: smtprelay.Retry{MaxAttempts: 1},
			Auth: func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) { return talker{}, nil },
			Dial: relaytest.Dial(0, func(_ int, line string) string {
				if line == "" || strings.HasPrefix(line, "EHLO") {
					return relaytest.Agree("250 AUTH X-TALK", line)
				}
				answers.Add(1)
				return "334 "
			}),
		})
		_, err := client.Send(t.Context(), numbered(0))
		if e := failure(err); e.Op != smtprelay.OpAuth || !strings.Contains(err.Error(), "more than 10 challenges") {
			t.Errorf("got %v", err)
		}
		if n := answers.Load(); n > 13 { // AUTH, ten answers, "*", QUIT
			t.Errorf("the client has said %d lines", n)
		}
	})
}

// talker is a mechanism that always has an answer.
type talker struct{}

func (talker) Start() (string, []byte, error) { return "X-TALK", nil, nil }

func (talker) Next(challenge []byte) ([]byte, error) { return []byte("and then?"), nil }

func TestSlowChallengesAreBoundedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(t, smtprelay.Config{
			Addr: "relay.example:25", TLS: smtprelay.TLSNone, AllowInsecureAuth: true, Retry: smtprelay.Retry{MaxAttempts: 1}, Timeouts: smtprelay.Timeouts{Command: time.Minute},
			Auth: func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) { return talker{}, nil },
			Dial: relaytest.Dial(0, func(_ int, line string) string {
				if line == "" || strings.HasPrefix(line, "EHLO") {
					return relaytest.Agree("250 AUTH X-TALK", line)
				}
				time.Sleep(25 * time.Second)
				return "334 "
			}),
		})
		began := time.Now()
		_, err := client.Send(t.Context(), numbered(0))
		if e := failure(err); e.Op != smtprelay.OpAuth || !e.Timeout() || time.Since(began) != 30*time.Second {
			t.Errorf("after %v: got %v", time.Since(began), err)
		}
		client.Close()
		time.Sleep(time.Minute) // for the relay to end
	})
}
