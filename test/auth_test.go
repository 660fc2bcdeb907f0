// AUTH: refused credentials and how long they are not retried, mechanisms that misbehave.
package test

import (
	"context"
	"errors"
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

// observed records when events of an observing fault happened.
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

// One AUTH per period, which grows: some relays lock the account after repeated attempts. In between, every Send fails at once
// with the relay's reply.
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
		// After 30 s, 1 min, 2, 4 and 5: a little over three of these in ten minutes.
		atMost(t, "AUTHs after the first burst", len(times)-first, 4)
		if len(times) == first {
			t.Error("the credentials were never tried again")
		}
		want(t, "messages at the relay", relay.Stats().Accepted, 0)
		want(t, "bodies that were sent nevertheless", commands(relay, "BDAT"), 0)
	})
}

// Once the credentials are right again, sending continues: at once with a new key from Config.Auth, and after the pause if the
// relay has enabled the account.
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
		for i := range 20 { // with the same key AUTH is sent once
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

		// A key that was refused may become right again.
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

func TestEndlessChallengesAreGivenUp(t *testing.T) {
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
			t.Errorf("the client has sent %d lines", n)
		}
	})
}

// talker is a mechanism that always has a response.
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

// behindAuth are relays that object to commands pipelined after AUTH, each in its way.
func behindAuth() map[string]smtptest.Fault {
	led := func(e smtptest.Event) bool { return e.AuthLed }
	leading := func(e smtptest.Event) bool { return e.AuthLed && e.N == 1 }
	rows := map[string]smtptest.Fault{
		"hangs up at AUTH":           {At: smtptest.Auth, Pipelined: true, Drop: true},
		"resets at AUTH":             {At: smtptest.Auth, Pipelined: true, Abort: true},
		"235 and hangs up":           {At: smtptest.Auth, Pipelined: true, Reply: "235 2.7.0 Accepted", Drop: true},
		"235 and discards the rest":  {At: smtptest.Auth, Pipelined: true, Discard: true},
		"is silent":                  {At: smtptest.Auth, Pipelined: true, Stall: true},
		"334 to an initial response": {At: smtptest.Auth, Pipelined: true, Reply: "334 "},
	}
	for _, reply := range []string{"503 5.5.1 Bad sequence", "500 5.5.2 What?", "554 5.7.1 No", "535 5.7.8 Authentication failed", "454 4.7.0 Not now", "421 4.7.0 Bye"} {
		rows[reply[:3]+" to AUTH"] = smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: reply}
		rows[reply[:3]+" to AUTH and hangs up"] = smtptest.Fault{At: smtptest.Auth, Pipelined: true, Reply: reply, Drop: true}
	}
	for _, reply := range []string{"530 5.7.0 Log in first", "503 5.5.1 Bad sequence", "554 5.7.1 No", "421 4.7.0 Bye"} {
		rows[reply[:3]+" to each MAIL of such a connection"] = smtptest.Fault{At: smtptest.Mail, When: led, Reply: reply}
	}
	for _, reply := range []string{"550 5.7.1 No", "451 4.7.0 Not yet"} {
		rows[reply[:3]+" to the MAIL after AUTH"] = smtptest.Fault{At: smtptest.Mail, When: leading, Reply: reply}
	}
	return rows
}

// A relay that objects to commands pipelined after AUTH costs some connections once, but no message, and no caller is told that
// the password is wrong.
func TestRelayThatRefusesCommandsAfterAuthCostsNoMessage(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		messages := fewer(200)
		for _, at := range []int{messages, 1} { // at once, or one after another
			send := func(habit *smtptest.Fault) (all []sent, took time.Duration, relay *smtptest.Server) {
				relay = newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
				if habit != nil {
					habit.Count = -1
					relay.Fault(*habit)
				}
				cfg := configOf(relay)
				cfg.Limits.MaxMessagesPerConn = 15 // so that AUTH is needed repeatedly
				client := newClient(t, cfg)
				began := time.Now()
				for len(all) < messages {
					all = append(all, sendAtOnce(t.Context(), client, len(all), at)...)
				}
				took = time.Since(began)
				client.Close()
				return all, took, relay
			}
			_, usual, _ := send(nil)
			for name, habit := range behindAuth() {
				all, took, relay := send(&habit)
				for _, s := range all {
					if s.err != nil {
						t.Errorf("%s, %d at once: %v", name, at, s.err)
						break
					}
				}
				checkLedger(t, relay, all)
				most := usual + 3*time.Second
				if habit.Stall { // indistinguishable from a slow relay
					most = usual + 11*time.Second
				}
				if took > most {
					t.Errorf("%s, %d at once: took %v, but %v without the fault", name, at, took, usual)
				}
				atMost(t, name+": connections", len(relay.Conns()), messages/15+1+20)
			}
		}
	})
}

// A wrong password is tried on one connection at a time, and then not for a while, however slow the refusal is.
func TestWrongPasswordIsTriedRarelyHoweverSlowItsRefusal(t *testing.T) {
	for _, slow := range []time.Duration{0, 500 * time.Millisecond, 3 * time.Second, 20 * time.Second, time.Minute} {
		for _, asked := range []bool{false, true} {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near)
				relay.Fault(smtptest.Fault{At: smtptest.Auth, Delay: slow, Reply: "535 5.7.8 Authentication failed", Count: -1})
				cfg := configOf(relay)
				if asked {
					username, password := cfg.Username, cfg.Password
					cfg.Username, cfg.Password = "", ""
					cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
						return sasl.NewPlainClient("", username, password), nil
					}
				}
				client := newClient(t, cfg)
				ends := time.Now().Add(10 * time.Minute)
				var senders sync.WaitGroup
				for i := range fewer(100) {
					senders.Go(func() {
						for time.Now().Before(ends) {
							if s := sendOne(t.Context(), client, i); s.outcome() != smtprelay.NotAccepted {
								t.Errorf("535 after %v: %v", slow, s.err)
							}
							time.Sleep(time.Second)
						}
					})
				}
				senders.Wait()
				atMost(t, slow.String()+": AUTHs in ten minutes", relay.Stats().Auths, 14)
				if relay.Stats().Auths < 2 {
					t.Errorf("%v: the credentials were not tried again", slow)
				}
			})
		}
	}
}

// Credentials that the relay has accepted are right: a later refusal is the relay's fault, and fails no message.
func TestRefusalOfCredentialsThatWereAcceptedFailsNoMessage(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.DropBodies = true })
		refused := relay.Fault(smtptest.Fault{At: smtptest.Auth, Nth: 2, Every: 10, Reply: "535 5.7.8 Authentication failed", Count: -1})
		cfg := configOf(relay)
		cfg.Limits.MaxMessagesPerConn = 20
		client := newClient(t, cfg)
		all := sendAtOnce(t.Context(), client, 0, 1)
		rounds := fewer(90)
		for range rounds {
			all = append(all, sendAtOnce(t.Context(), client, len(all), 100)...)
		}
		allAccepted(t, relay, all)
		if refused.Hits() < rounds/5 {
			t.Errorf("%d AUTHs were refused", refused.Hits())
		}
	})
}

// The relay's directory is down for 25 s: each AUTH is refused, in the middle of traffic.
func TestDirectoryThatIsDownForAWhileFailsNoMessage(t *testing.T) {
	for _, reply := range []string{"535 5.7.8 Authentication failed", "454 4.7.0 Temporary authentication failure", "421 4.3.0 Directory down"} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near)
			cfg := configOf(relay)
			cfg.Limits.MaxMessagesPerConn = 20
			client := newClient(t, cfg)
			all := make([]sent, fewer(3000)) // 50 a second for a minute, or fewer
			goesDown, isBack := len(all)/6, len(all)*7/12
			var senders sync.WaitGroup
			var down *smtptest.FaultHandle
			for i := range all {
				switch i {
				case goesDown:
					down = relay.Fault(smtptest.Fault{At: smtptest.Auth, Reply: reply, Drop: reply[0] == '4' && reply[1] == '2', Count: -1})
				case isBack:
					down.Remove()
				}
				senders.Go(func() { all[i] = sendOne(t.Context(), client, i) })
				time.Sleep(time.Minute / time.Duration(len(all)))
			}
			senders.Wait()
			allAccepted(t, relay, all)
			if down.Hits() == 0 {
				t.Error("no AUTH was sent while the directory was down")
			}
			atMost(t, "AUTHs while it was down", down.Hits(), 40)
		})
	}
}

// expiring are tokens, each of which is accepted a limited number of times.
type expiring struct {
	mu   sync.Mutex // guards the field below
	uses map[string]int
}

func (e *expiring) take(token string, most int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.uses[token]++
	return e.uses[token] <= most
}

// After a refused token, Config.Auth is asked once more, at once: it has a new token by then, and no caller notices.
func TestExpiredTokenIsReplacedAtOnce(t *testing.T) {
	for _, plain := range []bool{true, false} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			tokens := expiring{uses: map[string]int{}}
			relay := newRelay(t, near, func(s *smtptest.Server) {
				s.Mechanisms = []string{sasl.Plain, sasl.OAuthBearer}
				s.SASL = func(mechanism string) (smtptest.SASLServer, error) {
					if mechanism == sasl.Plain {
						return sasl.NewPlainServer(func(_, _, token string) error {
							if !tokens.take(token, 3) {
								return errExpired
							}
							return nil
						}), nil
					}
					return sasl.NewOAuthBearerServer(func(o sasl.OAuthBearerOptions) *sasl.OAuthBearerError {
						if !tokens.take(o.Token, 3) {
							return &sasl.OAuthBearerError{Status: "invalid_token"}
						}
						return nil
					}), nil
				}
			})
			cfg := configOf(relay)
			cfg.Username, cfg.Password = "", ""
			cfg.Limits.MaxMessagesPerConn = 5
			var cached atomic.Int64 // the cache returns each token for a while, sometimes for too long
			var asked atomic.Int64
			cfg.Auth = func(context.Context, smtprelay.ServerInfo) (smtprelay.Mechanism, error) {
				token := "token" + string(rune('a'+cached.Load()/4))
				cached.Add(1)
				asked.Add(1)
				if plain {
					return sasl.NewPlainClient("", "me", token), nil
				}
				return sasl.NewOAuthBearerClient(&sasl.OAuthBearerOptions{Username: "me", Token: token}), nil
			}
			client := newClient(t, cfg)
			var all []sent
			for range 30 {
				all = append(all, sendAtOnce(t.Context(), client, len(all), 10)...)
				time.Sleep(time.Second)
			}
			allAccepted(t, relay, all)
			for _, s := range all {
				if s.took > 5*time.Second {
					t.Errorf("message %d took %v", s.number, s.took)
				}
			}
			if relay.Stats().Auths < 20 {
				t.Errorf("%d AUTHs", relay.Stats().Auths)
			}
		})
	}
}

var errExpired = errors.New("expired")
