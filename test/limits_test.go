// Limits of connections, and of messages per connection: configured, announced by the relay, and learnt.
package test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// mostOnOne is the largest number of transactions of a connection.
func mostOnOne(relay *smtptest.Server) int {
	most := 0
	for _, c := range relay.Conns() {
		most = max(most, c.Mails)
	}
	return most
}

// All connections become ready at the same moment here, which once opened an extra one.
func TestBurstOpensNoMoreConnectionsThanItHasMessages(t *testing.T) {
	for n := range 10 {
		for range fewer(30) {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, far, inChunks)
				noneFailed(t, sendAtOnce(t.Context(), newClient(t, configOf(relay)), 0, n))
				atMost(t, fmt.Sprintf("connections for %d messages", n), len(relay.Conns()), n)
			})
		}
	}
}

// A relay reports too many connections in many ways. Each lowers the limit for a while, and as long as one connection works no
// Send fails, not even with a single attempt.
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

				// One connection works before others are opened.
				all := sendAtOnce(t.Context(), client, 0, 1)
				all = append(all, sendAtOnce(t.Context(), client, 1, fewer(200))...)
				if crowd.Hits() == 0 {
					t.Fatal("the relay never had too many connections: this test shows nothing")
				}
				most := allowed
				if fault.At == smtptest.FinalDot {
					most = 9 // a connection that gets no message before the end of the burst does not learn it
				} else {
					atMost(t, "connections opened, none of which replaces a refused one", len(relay.Conns()), 10)
				}
				if s := client.Stats(); s.MaxConns > most || s.MaxConns < 1 {
					t.Errorf("Stats().MaxConns is %d, want %d at most", s.MaxConns, most)
				}

				// While the relay keeps refusing, another connection is tried only now and then.
				before := crowd.Hits()
				for i := range 20 {
					time.Sleep(time.Minute)
					all = append(all, sendAtOnce(t.Context(), client, 1000+20*i, 12)...)
				}
				atMost(t, "refusals in 20 minutes", crowd.Hits()-before, 40)
				if crowd.Hits() == before {
					t.Error("a higher limit was never tried again")
				}

				// When the relay has room again, the limit returns.
				crowd.Remove()
				time.Sleep(2 * time.Hour)
				want(t, "Stats().MaxConns two hours later", client.Stats().MaxConns, 10)
				all = append(all, sendAtOnce(t.Context(), client, 100_000, fewer(200))...)
				want(t, "connections open for a burst", client.Stats().OpenConns, 10)
				allAccepted(t, relay, all)
			})
		})
	}
}

// When a burst opens connections on a cold Client, the relay refuses some at the greeting, long before the others are ready. The
// limit becomes what the relay allows, not what was ready by then.
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

				// One more is tried soon, although several were refused together.
				time.Sleep(crowdWait * 5 / 4)
				want(t, "Stats().MaxConns after the first wait", client.Stats().MaxConns, allowed+1)
				allAccepted(t, relay, all)
			})
		})
	}
}

// crowdWait is the minimum time that the limit stays low after the first "too many connections".
const crowdWait = 30 * time.Second

// moreThan returns a filter that is true for events on connections when n others, for which it was false, are still open.
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

// A relay that ends each connection after N messages teaches N: the first two refusals cost a retry elsewhere, then none is
// refused any more. Without further proof the limit is forgotten after a while.
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
		// Each connection that was open before may find out itself, with as many messages as it has in flight.
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
			t.Errorf("the most messages on a connection are still %d, eleven minutes later", most)
		}
		allAccepted(t, relay, all)
	})
}

// A forgotten limit is believed again as soon as it is met, and costs no second retry.
func TestForgottenLimitIsLearntAgainAtOnce(t *testing.T) {
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

// A relay that shuts down says so on all connections, which may have had the same number of messages.
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

// A single 421 is no limit: the relay may have restarted.
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

// Several are not a limit either, even after the same number of messages, as long as other connections carry more: a busy relay
// that sometimes says 421 must not get ever more connections.
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
		want(t, "refusals for a limit", relay.Stats().Refused, 0)
		atMost(t, "messages on one connection", mostOnOne(relay), 5)
		want(t, "RCPT commands", commands(relay, "RCPT"), 50*8) // so none was refused with 452
	})
}

func TestLIMITSHigherThanConfiguredAreIgnored(t *testing.T) {
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
		want(t, "transactions for three recipients", relay.Stats().Accepted, 2)
		noneFailed(t, sendAtOnce(t.Context(), client, 1, 200))
		atMost(t, "messages on one connection", mostOnOne(relay), 7)
	})
}

// Two programs share one allowance of ten: each assumes that it has all of it, and both make progress.
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
				for round := range 5 { // with pauses, in which one gives up connections and the other takes them
					results[i] = append(results[i], sendAtOnce(t.Context(), client, 100_000*i+1000*round, fewer(300))...)
					time.Sleep(time.Duration(40+20*i) * time.Second)
				}
			})
		}
		both.Wait()
		allAccepted(t, relay, slices.Concat(results[0], results[1]))
		// 3,000 refused connections would be too many.
		atMost(t, "connections refused", relay.Stats().Refused, 300)
	})
}

// A client that starts when the whole allowance is in use, permanently, gets its share as connections are replaced.
func TestLatecomerGetsItsShareOfTheAllowance(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = time.Second }) // so that time passes without many messages
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
		want(t, "duplicates", relay.Stats().Duplicates, 0)
	})
}

// A sender whose next message is ready as soon as one is accepted uses one connection, and no further one whenever it is faster
// than the bookkeeping.
func TestLoneSenderNeverOpensASecondConnection(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxMessages = -1 })
		cfg := configOf(relay)
		cfg.Limits.MaxMessagesPerConn = -1
		client := newClient(t, cfg)
		sendNumbered(t, client, 500, 1)
		want(t, "connections opened", len(relay.Conns()), 1)
	})
}

// A relay closes slowly: its connections count until then, and the limit holds.
func TestConnectionsCountUntilTheRelayHasClosedThem(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		relay.Fault(smtptest.Fault{At: smtptest.Quit, Delay: 3 * time.Second, Count: -1})
		cfg := configOf(relay)
		cfg.Limits.MaxMessagesPerConn = 5
		client := newClient(t, cfg)
		all := sendAtOnce(t.Context(), client, 0, 500)
		client.Close()
		allAccepted(t, relay, all)
		want(t, "most open at once", relay.Stats().MaxOpen, 10)
		want(t, "connections refused", relay.Stats().Refused, 0)
	})
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("over sockets, TLS: %t", secure), func(t *testing.T) {
			relay := newRelay(t, func(s *smtptest.Server) { s.NoTLS = !secure })
			cfg := configOf(relay)
			cfg.Limits.MaxMessagesPerConn = 5
			client := newClient(t, cfg)
			all := sendAtOnce(t.Context(), client, 0, 250)
			client.Close()
			allAccepted(t, relay, all)
			atMost(t, "open at once", relay.Stats().MaxOpen, 10)
			want(t, "connections refused", relay.Stats().Refused, 0)
		})
	}
}

func TestShortSessionsDoNotDelayOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var conns atomic.Int64
		c := bubbleClient(t, smtprelay.Config{Dial: relaytest.Dial(0, func(n int, l string) string {
			conns.Store(max(conns.Load(), int64(n)))
			if l == "." {
				time.Sleep(500 * time.Millisecond)
			}
			return relaytest.Agree("250-PIPELINING\n250 LIMITS MAILMAX=20", l)
		})})
		c.Send(t.Context(), shortMessage("b@y.example"))
		done := make(chan bool, 15)
		for range 15 {
			go func() { c.Send(t.Context(), shortMessage("b@y.example")); done <- true }()
		}
		for range 15 {
			<-done
		}
		if n := conns.Load(); n < 5 {
			t.Errorf("15 messages at once on %d connections", n)
		}
		c.Close()
	})
}

func TestConnectionTooOldWhenReadyCarriesAMessage(t *testing.T) {
	for _, age := range []time.Duration{5 * time.Second, time.Nanosecond} {
		synctest.Test(t, func(t *testing.T) {
			var conns atomic.Int64
			c := bubbleClient(t, smtprelay.Config{Limits: smtprelay.Limits{MaxConns: 1, MaxConnAge: age}, Dial: relaytest.Dial(0, func(n int, l string) string {
				conns.Store(int64(n))
				if l == "" {
					time.Sleep(6 * time.Second) // like a relay that waits for clients that send before the greeting
				}
				return relaytest.Agree("250 PIPELINING", l)
			})})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for i := range 3 {
				if _, err := c.Send(ctx, shortMessage("b@y.example")); err != nil {
					t.Errorf("age %v, message %d: %v", age, i, err)
				}
			}
			c.Close()
			if n := conns.Load(); n != 3 {
				t.Errorf("age %v: %d connections for 3 messages", age, n)
			}
			time.Sleep(time.Minute)
		})
	}
}
