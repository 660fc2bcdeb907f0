package smtprelay_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emersion/go-sasl"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// These tests are about what a Client finds out about its relay, and goes by for a while: that its credentials are wrong,
// that there are too many connections, or that a connection carries fewer messages or recipients than was configured.

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
				if e.Op != smtprelay.OpAuth || e.Code != 535 || e.Temporary() || e.Outcome != smtprelay.NotAccepted || s.took != 0 {
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
		// The first burst opens ten connections, and perhaps each of them has learnt the key's fate by a try of its own.
		first := slices.IndexFunc(times, func(at time.Time) bool { return !at.Equal(began) })
		if first < 1 || first > 10 {
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
		want(t, "messages at the relay", relay.Accepted(), 0)
		want(t, "bodies that left nevertheless", commands(relay, "BDAT"), 0)
	})
}

// commands is how many commands with that verb the relay has carried out or refused.
func commands(relay *smtptest.Server, verb string) (n int) {
	for _, c := range relay.Conns() {
		n += c.Commands[verb]
	}
	return n
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
		for i := range 20 { // the same key again and again: AUTH goes out once
			s := sendOne(t.Context(), client, i)
			if e := failure(s.err); e.Code != 535 || s.took != 0 {
				t.Fatalf("with the old key: %v after %v; want the 535 at once", s.err, s.took)
			}
			time.Sleep(time.Second)
		}
		want(t, "AUTHs with the old key in 20 s", len(auths.all()), 1)
		key.Store(good)
		time.Sleep(30 * time.Second) // the longest back-off
		if s := sendOne(t.Context(), client, 100); s.err != nil || s.took != 0 {
			t.Errorf("with the new key: %v after %v", s.err, s.took)
		}

		// And the key that was refused may be the right one again.
		broken := relay.Fault(smtptest.Fault{At: smtptest.Auth, Reply: "535 5.7.8 account suspended"})
		cfg = configOf(relay)
		client = newClient(t, cfg)
		if s := sendOne(t.Context(), client, 101); failure(s.err).Code != 535 {
			t.Errorf("suspended: %v", s.err)
		}
		want(t, "535s", broken.Hits(), 1)
		time.Sleep(29 * time.Second)
		if s := sendOne(t.Context(), client, 102); failure(s.err).Code != 535 || s.took != 0 {
			t.Errorf("in the pause: %v after %v; want the 535 at once", s.err, s.took)
		}
		time.Sleep(time.Second)
		if s := sendOne(t.Context(), client, 103); s.err != nil {
			t.Errorf("after the pause: %v", s.err)
		}
	})
}

// A relay says in many ways that there are too many connections. All of them lower the cap for a while, and as long as one
// connection works nobody fails, not even with a single attempt.
func TestTooManyConnectionsLowersTheCapAndFailsNobody(t *testing.T) {
	const allowed = 3
	forms := []struct {
		name string
		step func(*smtptest.Server) smtptest.Step
		smtptest.Fault
	}{
		{"421 greeting", at(smtptest.Connect), smtptest.Fault{Reply: "421 4.7.0 Too many concurrent SMTP connections", Drop: true}},
		{"421 at EHLO", at(smtptest.EHLO), smtptest.Fault{Reply: "421 4.7.0 Too many concurrent SMTP connections", Drop: true}},
		{"421 at AUTH", at(smtptest.Auth), smtptest.Fault{Reply: "421 4.7.0 Too many concurrent SMTP connections", Drop: true}},
		{"432 at AUTH", at(smtptest.Auth), smtptest.Fault{Reply: "432 4.3.2 Concurrent connections limit exceeded."}},
		{"535 with those words at AUTH (Mailtrap)", at(smtptest.Auth), smtptest.Fault{Reply: "535 5.7.8 Too many connections per account", Drop: true}},
		{"432 at DATA or BDAT (Microsoft 365)", bodyStep, smtptest.Fault{Reply: "432 4.3.2 Concurrent connections limit exceeded."}},
		{"432 at the final dot", at(smtptest.FinalDot), smtptest.Fault{Reply: "432 4.3.2 Concurrent connections limit exceeded."}},
	}
	for _, form := range forms {
		t.Run(form.name, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
				fault := form.Fault
				fault.At, fault.Count = form.step(relay), -1
				fault.When = moreThan(allowed, relay)
				crowd := relay.Fault(fault)
				cfg := configOf(relay)
				cfg.Retry.MaxAttempts = 1
				client := newClient(t, cfg)

				// One connection works before there are more.
				all := sendAtOnce(t.Context(), client, 0, 1)
				all = append(all, sendAtOnce(t.Context(), client, 1, 200)...)
				if crowd.Hits() == 0 {
					t.Fatal("the relay never had to say so: this test shows nothing")
				}
				most := allowed
				if fault.At == smtptest.FinalDot {
					most = 9 // a connection that gets no message before the burst is over is not told
				} else {
					atMost(t, "connections opened, of which none takes the place of one too many", len(relay.Conns()), 10)
				}
				if s := client.Stats(); s.MaxConns > most || s.MaxConns < 1 {
					t.Errorf("Stats().MaxConns is %d, want %d at most", s.MaxConns, most)
				}

				// While the relay goes on like that, it is asked now and then only.
				before := crowd.Hits()
				for i := range 20 {
					time.Sleep(time.Minute)
					all = append(all, sendAtOnce(t.Context(), client, 1000+20*i, 12)...)
				}
				atMost(t, "refusals in 20 minutes", crowd.Hits()-before, 40)
				if crowd.Hits() == before {
					t.Error("a higher cap was never tried again")
				}

				// And when it has room again, the cap comes back.
				crowd.Remove()
				time.Sleep(2 * time.Hour)
				want(t, "Stats().MaxConns two hours later", client.Stats().MaxConns, 10)
				all = append(all, sendAtOnce(t.Context(), client, 100_000, 200)...)
				want(t, "connections open for a burst", client.Stats().OpenConns, 10)
				allAccepted(t, relay, all)
			})
		})
	}
}

// Of the connections that a burst opens on a cold Client the relay refuses some at the greeting, long before the others are
// ready. The cap becomes what it allows, not what was ready by then.
func TestTooManyConnectionsAtAColdStartLeaveAsManyAsTheRelayAllows(t *testing.T) {
	for _, allowed := range []int{1, 3, 8, 9} {
		t.Run(fmt.Sprint(allowed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, func(s *smtptest.Server) {
					s.InMemory, s.Delay, s.MaxConns = true, 20*time.Millisecond, allowed
				})
				client := newClient(t, configOf(relay))
				all := sendAtOnce(t.Context(), client, 0, 200)
				want(t, "Stats().MaxConns", client.Stats().MaxConns, allowed)

				// The first try of one more is not put off for long because several were refused together.
				time.Sleep(crowdWait * 5 / 4)
				want(t, "Stats().MaxConns after the first wait", client.Stats().MaxConns, allowed+1)
				allAccepted(t, relay, all)
			})
		})
	}
}

// crowdWait is how long the cap stays low after the relay has said "too many connections" for the first time, at least.
const crowdWait = 30 * time.Second

// moreThan returns what is true for events on connections beside n others that it was false for and that are still open.
func moreThan(n int, relay *smtptest.Server) func(smtptest.Event) bool {
	var mu sync.Mutex
	let := make(map[int]bool)
	return func(e smtptest.Event) bool {
		mu.Lock()
		defer mu.Unlock()
		open := 0
		for _, c := range relay.Conns() {
			if c.Open && let[c.Conn] && c.Conn != e.Conn {
				open++
			}
		}
		let[e.Conn] = open < n
		return open >= n
	}
}

func at(s smtptest.Step) func(*smtptest.Server) smtptest.Step {
	return func(*smtptest.Server) smtptest.Step { return s }
}

// A relay that ends each connection after N messages teaches N: the first two cost a try elsewhere, and then none is
// refused any more. After a while without proof that is forgotten.
func TestRelayThatSays421AfterNMessagesTeachesN(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		const n = 7
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		full := relay.Fault(smtptest.Fault{
			At: smtptest.Mail, Reply: "421 4.7.0 Maximum message count per session reached", Drop: true, Count: -1,
			When: func(e smtptest.Event) bool { return e.Message > n },
		})
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = 1 // such a 421 is not the message's fault
		client := newClient(t, cfg)
		all := sendAtOnce(t.Context(), client, 0, 300)
		learning := full.Hits()
		if learning == 0 {
			t.Fatal("nothing was refused: this test shows nothing")
		}
		// Each connection that was open before may find out for itself, with as many messages as are under way on it.
		atMost(t, "refusals until it was known", learning, 10*4)
		all = append(all, sendAtOnce(t.Context(), client, 300, 300)...)
		want(t, "refusals once it was known", full.Hits()-learning, 0)

		full.Remove()
		time.Sleep(11 * time.Minute)
		before := len(relay.Conns())
		all = append(all, sendAtOnce(t.Context(), client, 600, 300)...)
		most := 0
		for _, c := range relay.Conns()[before:] { // those before have had a MAIL too many
			most = max(most, c.Mails)
		}
		if most <= n {
			t.Errorf("the most messages on a connection are %d still, eleven minutes later", most)
		}
		allAccepted(t, relay, all)
	})
}

// What was forgotten is believed again as soon as it is met, and costs no second message a try.
func TestLimitThatWasForgottenIsLearntAgainAtOnce(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		const n = 7
		relay := newRelay(t, near)
		full := relay.Fault(smtptest.Fault{
			At: smtptest.Mail, Reply: "421 4.7.0 Maximum message count per session reached", Drop: true, Count: -1,
			When: func(e smtptest.Event) bool { return e.Message > n },
		})
		client := newClient(t, configOf(relay))
		sendNumbered(t, client, 5*n, 1)
		want(t, "refusals until it was known", full.Hits(), 2)
		time.Sleep(11 * time.Minute)
		sendNumbered(t, client, 5*n, 1)
		want(t, "refusals in all", full.Hits(), 3)
	})
}

// A relay that is shut down tells all connections, which may have had the same number of messages.
func TestRelayThatIsShutDownTeachesNothing(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		client := newClient(t, configOf(relay))
		noneFailed(t, sendAtOnce(t.Context(), client, 0, 3))
		want(t, "connections before", len(relay.Conns()), 3)
		time.Sleep(time.Second)
		down := relay.Fault(smtptest.Fault{
			At: smtptest.Mail, Reply: "421 4.3.2 going down", Drop: true, Count: -1,
			When: func(e smtptest.Event) bool { return e.Conn <= 3 },
		})
		noneFailed(t, sendAtOnce(t.Context(), client, 3, 3))
		want(t, "421s", down.Hits(), 3)
		sendNumbered(t, client, 50, 1)
		atMost(t, "connections", len(relay.Conns()), 6)
	})
}

// A single 421 is no limit: the relay may have been restarted.
func TestOne421TeachesNothing(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		client := newClient(t, configOf(relay))
		sendNumbered(t, client, 5, 1)
		relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: "421 4.3.2 going down", Drop: true})
		sendNumbered(t, client, 50, 1)
		want(t, "connections", len(relay.Conns()), 2)
		want(t, "messages on the second one", relay.Conns()[1].Accepted, 50)
	})
}

// Nor are several of them, after the same number of messages even, as long as other connections go further: a relay that says
// 421 now and then, having too much to do, must not be given ever more connections to deal with.
func TestRandom421sTeachNothing(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		busy := relay.Fault(smtptest.Fault{
			At: smtptest.Mail, Reply: "421 4.3.2 too busy", Drop: true, Count: -1,
			When: func(e smtptest.Event) bool { return e.Message == 6 && e.Conn%2 == 1 },
		})
		client := newClient(t, configOf(relay))
		sendNumbered(t, client, 5+100+5+100+5+100, 1)
		want(t, "421s", busy.Hits(), 3)
		for i, c := range relay.Conns() {
			want(t, fmt.Sprintf("messages on connection %d", i+1), c.Accepted, []int{5, 100}[i%2])
		}
		want(t, "connections", len(relay.Conns()), 6)
	})
}

func TestLIMITSLowerThanConfiguredWin(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) {
			s.Delay = 20 * time.Millisecond
			s.Extensions = []string{"LIMITS MAILMAX=5 RCPTMAX=3 RCPTDOMAINMAX=4"}
			s.MaxMessages, s.MaxRecipients = 5, 3
		})
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = 1
		client := newClient(t, cfg)
		var senders sync.WaitGroup
		for i := range 50 {
			senders.Go(func() {
				m := numbered(i)
				for r := range 7 {
					m.To = append(m.To, fmt.Sprintf("r%d@domain%d.example", r, i%3))
				}
				if _, err := client.Send(t.Context(), m); err != nil {
					t.Errorf("message %d: %v", i, err)
				}
			})
		}
		senders.Wait()
		recipients := 0
		for _, m := range relay.Messages() {
			recipients += len(m.To)
			atMost(t, "recipients of a transaction", len(m.To), 3)
		}
		want(t, "recipients", recipients, 50*8)
		want(t, "refusals for a limit", relay.Refused421(), 0)
		atMost(t, "messages on one connection", mostOnOne(relay), 5)
		want(t, "RCPT commands", commands(relay, "RCPT"), 50*8) // so that none was refused with 452
	})
}

func TestLIMITSHigherThanConfiguredDoNot(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) {
			s.Delay = 20 * time.Millisecond
			s.Extensions = []string{"LIMITS MAILMAX=1000 RCPTMAX=1000"}
		})
		cfg := configOf(relay)
		cfg.Limits.MaxMessagesPerConn, cfg.Limits.MaxRecipients = 7, 2
		client := newClient(t, cfg)
		m := numbered(0)
		m.To = []string{"a@example.org", "b@example.org", "c@example.org"}
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Error(err)
		}
		want(t, "transactions for three recipients", relay.Accepted(), 2)
		noneFailed(t, sendAtOnce(t.Context(), client, 1, 200))
		atMost(t, "messages on one connection", mostOnOne(relay), 7)
	})
}

// 452 to a recipient says that the others may have another transaction; so does 552, which old relays say (RFC 5321,
// 4.5.3.1.10). Each recipient gets the message once. With AllOrNothing nobody gets it, since nobody could take it back.
func TestTooManyRecipientsGoInFurtherTransactions(t *testing.T) {
	for _, reply := range []string{"452 4.5.3 Too many recipients", "452 too many", "552 too many recipients", "451 4.5.3 Too many recipients"} {
		t.Run(reply, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				const most, recipients = 10, 95
				relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
				relay.Fault(smtptest.Fault{
					At: smtptest.Rcpt, Reply: reply, Count: -1,
					When: func(e smtptest.Event) bool { return len(e.To) >= most },
				})
				client := newClient(t, configOf(relay))
				m := numbered(0)
				m.To = moreRecipients(recipients)
				m.AllOrNothing = true
				_, err := client.Send(t.Context(), m)
				if e := failure(err); e.Outcome != smtprelay.NotAccepted || relay.Accepted() != 0 {
					t.Errorf("AllOrNothing: %v, and the relay has taken %d messages; want it for nobody", err, relay.Accepted())
				}

				m.AllOrNothing = false
				receipt, err := client.Send(t.Context(), m)
				if err != nil {
					t.Fatal(err)
				}
				ids := map[string][]string{}
				for _, got := range relay.Messages() {
					for _, to := range got.To {
						ids[to] = append(ids[to], got.ID)
					}
				}
				want(t, "recipients", len(ids), recipients)
				want(t, "transactions", relay.Accepted(), (recipients+most-1)/most)
				for _, r := range receipt.Recipients {
					if len(ids[r.To]) != 1 || ids[r.To][0] != r.QueueID || r.Outcome != smtprelay.Accepted {
						t.Errorf("%s: %v as %q; the relay has %q", r.To, r.Outcome, r.QueueID, ids[r.To])
					}
				}
			})
		})
	}
}

// limitRcpts has relay take n recipients in a transaction, and say so to the others.
func limitRcpts(relay *smtptest.Server, n int) {
	relay.Fault(smtptest.Fault{
		At: smtptest.Rcpt, Reply: "452 4.5.3 Too many recipients", Count: -1,
		When: func(e smtptest.Event) bool { return len(e.To) >= n },
	})
}

func TestNumberOfRecipientsIsLearntWithinAMessage(t *testing.T) {
	for _, tt := range []struct{ most, recipients, commands int }{
		{1, 1000, 4500},
		{50, 2000, 2000 + 950 + 2*40 + 150}, // the first transaction, and now and then a few too many
	} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
			limitRcpts(relay, tt.most)
			m := numbered(0)
			m.To = moreRecipients(tt.recipients)
			if _, err := newClient(t, relay.Config()).Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			all := 0
			for _, verb := range []string{"EHLO", "RSET", "MAIL", "RCPT", "DATA", "BDAT", "QUIT"} {
				all += commands(relay, verb)
			}
			if all > tt.commands {
				t.Errorf("%d recipients, %d in a transaction: %d commands, want at most %d", tt.recipients, tt.most, all, tt.commands)
			}
		})
	}
}

func TestNumberOfRecipientsIsRememberedForAWhile(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
		limitRcpts(relay, 50)
		client := newClient(t, relay.Config())
		send := func() (rcpts int) {
			before := commands(relay, "RCPT")
			m := numbered(0)
			m.To = moreRecipients(1000)
			if _, err := client.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			return commands(relay, "RCPT") - before
		}
		if n := send(); n < 1950 {
			t.Errorf("at first: %d RCPT commands, want all 1000 offered at once", n)
		}
		if n := send(); n > 1050 {
			t.Errorf("then: %d RCPT commands, want 1000 and a few", n)
		}
		time.Sleep(11 * time.Minute)
		if n := send(); n < 1950 {
			t.Errorf("after eleven minutes: %d RCPT commands, want all 1000 offered at once", n)
		}
	})
}

// Postfix hangs up on the twentieth refusal of a session. What it took by then is the number; nothing is unknown, since it was
// leaving when it came to the message.
func TestRelayThatLeavesOverTooManyRecipientsTeachesTheNumberToo(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
		var refused atomic.Int64
		relay.Fault(smtptest.Fault{
			At: smtptest.Rcpt, Reply: "421 4.7.0 Error: too many errors", Drop: true,
			When: func(smtptest.Event) bool { return refused.Load() == 20 },
		})
		relay.Fault(smtptest.Fault{
			At: smtptest.Rcpt, Reply: "452 4.5.3 Error: too many recipients", Count: -1,
			When: func(e smtptest.Event) bool {
				if len(e.To) < 50 {
					return false
				}
				refused.Add(1)
				return true
			},
		})
		client := newClient(t, relay.Config())
		if _, err := client.Send(t.Context(), numbered(1)); err != nil { // behind AUTH the body would wait for all replies
			t.Fatal(err)
		}
		m := numbered(0)
		m.To = moreRecipients(200)
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		want(t, "transactions", relay.Accepted(), 1+4)
		want(t, "connections", len(relay.Conns()), 2)
	})
}

// A mailbox that is full has the same code as one recipient too many.
func TestFullMailboxesTeachNoNumber(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		var lifted atomic.Bool
		relay.Fault(smtptest.Fault{
			At: smtptest.Rcpt, Reply: "452 4.2.2 mailbox full", Count: -1,
			When: func(e smtptest.Event) bool { return !lifted.Load() && e.Rcpt != "r1@y.example" },
		})
		client := newClient(t, relay.Config())
		m := numbered(0)
		m.To = moreRecipients(5)
		for range 2 {
			_, err := client.Send(t.Context(), m)
			want(t, "refused", len(failure(err).Refused), 4)
		}
		lifted.Store(true)
		before := relay.Accepted()
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		want(t, "transactions", relay.Accepted()-before, 1)
	})
}

func TestThousandRecipientsGoIntoOneTransactionUnlessToldOtherwise(t *testing.T) {
	for _, tt := range []struct {
		why                    string
		max, recipients, as    int
		allOrNothing, onceOnly bool
	}{
		{why: "a thousand", recipients: 1000, as: 1},
		{why: "more than that", recipients: 2001, as: 3},
		{why: "no limit", max: -1, recipients: 2001, as: 1},
		{why: "AllOrNothing is one transaction", recipients: 2001, as: 1, allOrNothing: true},
		{why: "and so is what can be written once only", recipients: 2001, as: 1, onceOnly: true},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
				cfg := relay.Config()
				cfg.Limits.MaxRecipients = tt.max
				m := numbered(0)
				m.To, m.AllOrNothing = moreRecipients(tt.recipients), tt.allOrNothing
				if tt.onceOnly {
					m.Body = smtprelay.Reader(strings.NewReader("Subject: once\r\n\r\nonce\r\n"))
				}
				if _, err := newClient(t, cfg).Send(t.Context(), m); err != nil {
					t.Fatal(err)
				}
				want(t, "transactions", relay.Accepted(), tt.as)
			})
		})
	}
}

// Two programs that share one allowance of ten: each thinks that all of it is its own, and both get on.
func TestTwoClientsShareAnAllowance(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = -1
		var both sync.WaitGroup
		var results [2][]sent
		for i := range results {
			client := newClient(t, cfg)
			both.Go(func() {
				for round := range 5 { // with pauses, in which connections are given up and taken by the other
					results[i] = append(results[i], sendAtOnce(t.Context(), client, 100_000*i+1000*round, 300)...)
					time.Sleep(time.Duration(40+20*i) * time.Second)
				}
			})
		}
		both.Wait()
		allAccepted(t, relay, slices.Concat(results[0], results[1]))
		// 3,000 refused connections would be hammering.
		atMost(t, "connections refused", relay.Refused421(), 300)
	})
}

// Somebody who comes when all of the allowance is in use, and stays so, gets his part as connections are replaced.
func TestLatecomerGetsHisPartOfTheAllowance(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = time.Second }) // so that time passes, and not messages
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = -1
		cfg.Limits.MaxMessagesPerConn = 20
		first, second := newClient(t, cfg), newClient(t, cfg)
		enough := make(chan struct{})
		var greedy sync.WaitGroup
		for i := range 20 {
			greedy.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-enough:
						return
					default:
					}
					if s := sendOne(t.Context(), first, 1_000_000+1000*i+n); s.err != nil {
						t.Errorf("the first: %v", s.err)
						return
					}
				}
			})
		}
		time.Sleep(time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
		defer cancel()
		results := sendAtOnce(ctx, second, 0, 100)
		close(enough)
		greedy.Wait()
		noneFailed(t, results)
		want(t, "duplicates", relay.Duplicates(), 0)
	})
}

// A relay that wants another mechanism says so for good. A wrong certificate may be that of somebody on the way, who may be
// gone later. Both are told at once, and nobody tries again.
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
				t.Errorf("%v; want an error that is told at once, temporary: %t", s.err, i == 1)
			}
			want(t, "connections", len(relay.Conns())-before, 1)
		}
	})
}

// moreRecipients are those of a call with more=n.
func moreRecipients(n int) (to []string) {
	for i := range n {
		to = append(to, fmt.Sprintf("r%d@y.example", i+1))
	}
	return to
}
