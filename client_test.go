// Acceptance tests: what the README promises, and no more. They use only the relay's own counters, and time nothing: times are
// the fake time of a synctest bubble. Tests by topic are in test/.
package smtprelay_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// newRelay returns a started relay with STARTTLS that is closed at the end of the test.
func newRelay(t *testing.T, set ...func(*smtptest.Server)) *smtptest.Server {
	t.Helper()
	relay := smtptest.NewUnstartedServer()
	for _, f := range set {
		f(relay)
	}
	relay.Start()
	t.Cleanup(relay.Close)
	return relay
}

// configOf is the configuration for relay, with Chunking if the relay offers it.
func configOf(relay *smtptest.Server) smtprelay.Config {
	cfg := relay.Config()
	cfg.Chunking = relay.Chunking
	return cfg
}

func newClient(t *testing.T, cfg smtprelay.Config) *smtprelay.Client {
	t.Helper()
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// far makes a relay in memory, for a synctest bubble, at a distance of 20 ms.
func far(s *smtptest.Server) {
	s.InMemory = true
	s.Delay = 20 * time.Millisecond
	s.DropBodies = true
}

// numbered returns the ith of many different messages.
func numbered(i int) smtprelay.Message {
	return smtprelay.Message{
		From: "shop@example.com",
		To:   []string{fmt.Sprintf("customer%d@example.org", i)},
		Body: smtprelay.Bytes(fmt.Appendf(nil, "Subject: order %d\r\n\r\nIt is ready.\r\n", i)),
	}
}

// sendNumbered sends n messages from the given number of goroutines and fails the test if one of them is not accepted.
func sendNumbered(t *testing.T, client *smtprelay.Client, n, goroutines int) {
	t.Helper()
	numbers := make(chan int)
	var senders sync.WaitGroup
	for range goroutines {
		senders.Go(func() {
			for i := range numbers {
				if _, err := client.Send(t.Context(), numbered(i)); err != nil {
					t.Errorf("message %d: %v", i, err)
				}
			}
		})
	}
	for i := range n {
		numbers <- i
	}
	close(numbers)
	senders.Wait()
}

// want fails the test if a figure differs.
func want(t *testing.T, what string, got, want int) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %d, want %d", what, got, want)
	}
}

func atMost(t *testing.T, what string, got, most int) {
	t.Helper()
	if got > most {
		t.Errorf("%s: got %d, want at most %d", what, got, most)
	}
}

// mostOnOne is the largest number of transactions of a connection.
func mostOnOne(relay *smtptest.Server) int {
	most := 0
	for _, c := range relay.Conns() {
		most = max(most, c.Mails)
	}
	return most
}

func TestThousandMessagesFromAHundredGoroutines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		client := newClient(t, configOf(relay))
		sendNumbered(t, client, 1000, 100)

		want(t, "accepted by the relay", relay.Stats().Accepted, 1000)
		want(t, "duplicates", relay.Stats().Duplicates, 0)
		want(t, "refused for a limit", relay.Stats().Refused, 0)
		atMost(t, "open at once", relay.Stats().MaxOpen, 10)
		want(t, "connections opened", len(relay.Conns()), 10)
		atMost(t, "messages on one connection", mostOnOne(relay), 100)
		atMost(t, "turns for 1,000 messages, once a connection is up", relay.Stats().MessageTurns, 1050)
		want(t, "NOOPs", relay.Stats().Commands["NOOP"], 0)
		want(t, "AUTHs", relay.Stats().Auths, 10)

		s := client.Stats()
		want(t, "Stats().Accepted", int(s.Accepted), 1000)
		want(t, "Stats().NotAccepted", int(s.NotAccepted), 0)
		want(t, "Stats().Unknown", int(s.Unknown), 0)
		want(t, "Stats().Retries", int(s.Retries), 0)
		want(t, "Stats().Dials", int(s.Dials), 10)
	})
}

// In the bubble a turn takes 20 ms, and nothing else takes time.
func TestColdPoolDialsInParallelAndLaterConnectionsLogInWithTheirFirstMessage(t *testing.T) {
	const turn = 20 * time.Millisecond
	for _, tc := range []struct {
		name  string
		start func(*smtptest.Server)
		turns int // to the receipt of a connection's first message, once the credentials are proven
	}{
		// SYN, greeting, EHLO, AUTH with the envelope, body.
		{"plaintext", func(s *smtptest.Server) { s.NoTLS = true; s.Start() }, 5},
		// A TLS handshake before the greeting.
		{"implicit TLS", (*smtptest.Server).StartTLS, 6},
		// SYN, greeting, EHLO, STARTTLS, handshake, EHLO, AUTH with the envelope, body.
		{"STARTTLS", (*smtptest.Server).Start, 8},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// send sends n messages at once, and returns how many were accepted after how many turns.
			send := func(t *testing.T, client *smtprelay.Client, n int) map[int]int {
				began := time.Now()
				after := make(map[int]int)
				var mu sync.Mutex
				var senders sync.WaitGroup
				for i := range n {
					senders.Go(func() {
						if _, err := client.Send(t.Context(), numbered(i)); err != nil {
							t.Errorf("message %d: %v", i, err)
						}
						mu.Lock()
						defer mu.Unlock()
						after[int(time.Since(began)/turn)]++
					})
				}
				senders.Wait()
				return after
			}
			start := func(t *testing.T) (*smtptest.Server, *smtprelay.Client) {
				relay := smtptest.NewUnstartedServer()
				far(relay)
				tc.start(relay)
				t.Cleanup(relay.Close)
				return relay, newClient(t, configOf(relay))
			}
			synctest.Test(t, func(t *testing.T) {
				relay, client := start(t)
				after := send(t, client, 100)
				for n := range 10 { // one turn more: one connection logs in alone, and the others wait for it
					want(t, fmt.Sprintf("messages accepted after %d turns", tc.turns+1+n), after[tc.turns+1+n], 10)
				}
				want(t, "connections opened", len(relay.Conns()), 10)
			})
			synctest.Test(t, func(t *testing.T) {
				relay, client := start(t)
				want(t, "accepted when the first connection has logged in", send(t, client, 1)[tc.turns+1], 1)
				time.Sleep(time.Minute) // the first connection expires
				want(t, "accepted when the second has", send(t, client, 1)[tc.turns], 1)
				want(t, "connections opened", len(relay.Conns()), 2)
			})
		})
	}
}

func TestLoneSenderTakesTwoTurnsForEachMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		client := newClient(t, configOf(relay))
		sendNumbered(t, client, 25, 1)

		want(t, "accepted by the relay", relay.Stats().Accepted, 25)
		want(t, "connections opened", len(relay.Conns()), 1)
		want(t, "turns for 25 messages, once the connection is up", relay.Stats().MessageTurns, 50)
		want(t, "RSETs", relay.Stats().Commands["RSET"], 0)
		want(t, "NOOPs", relay.Stats().Commands["NOOP"], 0)
	})
}

// If the relay offers CHUNKING, envelope and body are sent in one write, and several messages follow one another on a connection
// without waiting for replies.
func TestChunkingTakesOneTurnForALoneMessageAndFewForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		chunking := func(s *smtptest.Server) { s.Chunking = true }
		relay := newRelay(t, far, chunking)
		sendNumbered(t, newClient(t, configOf(relay)), 25, 1)
		want(t, "accepted by the relay", relay.Stats().Accepted, 25)
		want(t, "turns for 25 messages, and one for the first's AUTH", relay.Stats().MessageTurns, 26)

		relay = newRelay(t, far, chunking)
		sendNumbered(t, newClient(t, configOf(relay)), 1000, 100)
		want(t, "accepted by the relay", relay.Stats().Accepted, 1000)
		want(t, "duplicates", relay.Stats().Duplicates, 0)
		want(t, "refused for a limit", relay.Stats().Refused, 0)
		atMost(t, "open at once", relay.Stats().MaxOpen, 10)
		atMost(t, "messages on one connection", mostOnOne(relay), 100)
		atMost(t, "turns for 1,000 messages, once a connection is up", relay.Stats().MessageTurns, 500)
	})
}

// Two of nine pipelining servers that were tested do not accept commands that arrive together with a final dot. No caller may
// notice, and the client may try it only once.
func TestRelayThatBreaksOverlapIsNoticedOnceAndSpared(t *testing.T) {
	for _, test := range []struct {
		name  string
		habit smtptest.Habit
		waits int // short waits (Timeouts.Overlap) that this may cost
		why   string
	}{
		{"503 to commands after a final dot", smtptest.HabitRefuse, 0, "the replies are in step: the session continues"},
		{"no reply to commands after a final dot", smtptest.HabitDiscard, 1, "only a timer shows it, but one is enough"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, far, func(s *smtptest.Server) { s.Behind = test.habit })
				cfg := configOf(relay)
				cfg.Timeouts.Overlap = time.Hour // distinguishable from everything else that takes time
				cfg.Timeouts.Outage = -1
				client := newClient(t, cfg)

				start := time.Now()
				sendNumbered(t, client, 500, 50)
				want(t, "accepted by the relay", relay.Stats().Accepted, 500)
				want(t, "duplicates", relay.Stats().Duplicates, 0)
				atMost(t, "open at once", relay.Stats().MaxOpen, 10)
				atMost(t, "short waits: "+test.why, int(time.Since(start)/cfg.Timeouts.Overlap), test.waits)
				if s := client.Stats(); s.Accepted != 500 || s.NotAccepted+s.Unknown != 0 {
					t.Errorf("accepted %d, not accepted %d, unknown %d; want 500, 0, 0", s.Accepted, s.NotAccepted, s.Unknown)
				}

				learnt := client.Stats().Overlapped
				if learnt == 0 {
					t.Error("nothing was overlapped: this test shows nothing")
				}
				start = time.Now()
				sendNumbered(t, client, 500, 50)
				want(t, "accepted by the relay", relay.Stats().Accepted, 1000)
				want(t, "overlaps after it was known", int(client.Stats().Overlapped-learnt), 0)
				want(t, "short waits after it was known", int(time.Since(start)/cfg.Timeouts.Overlap), 0)
			})
		})
	}
}

func TestRotationCostsNoMessageAndNoRetry(t *testing.T) {
	const messages = 350 // each of the ten connections is replaced several times, whatever the limit
	for _, limit := range []int{1, 2, 5, 7} {
		t.Run(fmt.Sprintf("%d on a connection", limit), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, far, func(s *smtptest.Server) {
					s.MaxMessages = limit
					s.NoTLS = true // this is not about hundreds of handshakes
				})
				cfg := configOf(relay)
				cfg.Limits.MaxMessagesPerConn = limit
				client := newClient(t, cfg)
				sendNumbered(t, client, messages, 100)

				want(t, "accepted by the relay", relay.Stats().Accepted, messages)
				want(t, "duplicates", relay.Stats().Duplicates, 0)
				want(t, "refused for a limit", relay.Stats().Refused, 0)
				atMost(t, "messages on one connection", mostOnOne(relay), limit)
				atMost(t, "open at once", relay.Stats().MaxOpen, 10)
				s := client.Stats()
				want(t, "Stats().Retries", int(s.Retries), 0)
				want(t, "Stats().DialErrors", int(s.DialErrors), 0)
				if per := messages / limit; len(relay.Conns()) < per || len(relay.Conns()) > per+10 {
					t.Errorf("%d connections for %d messages, want about %d", len(relay.Conns()), messages, per)
				}
			})
		})
	}
}

func TestRotationsAreSpreadUnderSteadyLoad(t *testing.T) {
	const setUp = 5 * 20 * time.Millisecond // in plaintext: SYN, greeting, EHLO, AUTH with the first envelope, and the body
	run := func(t *testing.T, bursts ...int) (replaced []time.Time, client *smtprelay.Client) {
		relay := newRelay(t, far, func(s *smtptest.Server) { s.NoTLS = true })
		cfg := configOf(relay)
		var mu sync.Mutex // guards replaced
		cfg.Trace = &smtprelay.Trace{ConnClosed: func(_ context.Context, c smtprelay.ConnClosedInfo) {
			if c.Reason == "full" {
				mu.Lock()
				replaced = append(replaced, time.Now())
				mu.Unlock()
			}
		}}
		client = newClient(t, cfg)
		for _, n := range bursts {
			sendNumbered(t, client, n, 100)
			time.Sleep(time.Second)
		}
		mu.Lock()
		defer mu.Unlock()
		return replaced, client
	}

	t.Run("steady load", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			replaced, _ := run(t, 4500)
			if len(replaced) < 35 {
				t.Fatalf("%d connections were used up, want some 45", len(replaced))
			}
			// The first two sets of ten are used up at the same time.
			later, most := replaced[20:], 0
			for i, at := range later {
				together := 0
				for _, other := range later[i:] {
					if other.Sub(at) < setUp {
						together++
					}
				}
				most = max(most, together)
			}
			atMost(t, "connections replaced during the set-up of one", most, 3)
		})
	})
	t.Run("bursts open no additional connection", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			_, client := run(t, 700, 700, 1100, 500)
			want(t, "connections opened for 3,000 messages", int(client.Stats().Dials), 30)
		})
	})
}

func TestSendMailIsAllOrNothing(t *testing.T) {
	relay := newRelay(t, func(s *smtptest.Server) {
		s.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"}
	})
	client := newClient(t, configOf(relay))
	msg := []byte("Subject: hello\r\n\r\nHello.\r\n")

	err := client.SendMail("shop@example.com", []string{"ann@example.org", "gone@example.org"}, msg)
	if err == nil || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || !strings.Contains(err.Error(), "gone@example.org") {
		t.Errorf("got %v, want the refusal of gone@example.org and nothing accepted", err)
	}
	want(t, "accepted by the relay", relay.Stats().Accepted, 0)
	if err := client.SendMail("shop@example.com", []string{"ann@example.org", "bob@example.org"}, msg); err != nil {
		t.Error(err)
	}
	want(t, "accepted by the relay", relay.Stats().Accepted, 1)
	want(t, "connections opened", len(relay.Conns()), 1)
}

func TestSendAllEndsWhileItsIteratorIsBlocked(t *testing.T) {
	for _, tt := range []struct {
		why  string
		end  func(cancel func(), client *smtprelay.Client)
		loop bool // leave the loop at the first result
	}{
		{"the context ends", func(cancel func(), _ *smtprelay.Client) { cancel() }, false},
		{"the Client is closed", func(_ func(), client *smtprelay.Client) { client.Close() }, false},
		{"the Client is shut down", func(_ func(), client *smtprelay.Client) { client.Shutdown(context.Background()) }, false},
		{"the loop is left", func(func(), *smtprelay.Client) {}, true},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, far)
				client := newClient(t, configOf(relay))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				queue := make(chan smtprelay.Message, 2)
				queue <- numbered(0)
				queue <- numbered(1)
				ended := make(chan bool, 1)
				messages := func(yield func(smtprelay.Message) bool) {
					for m := range queue {
						if !yield(m) {
							ended <- true
							return
						}
					}
				}
				results := 0
				for r := range client.SendAll(ctx, messages) {
					if r.Err != nil {
						t.Error(r.Err)
					}
					results++
					if tt.loop {
						break
					}
					if results == 2 {
						go tt.end(cancel, client)
					}
				}
				if !tt.loop {
					want(t, "results", results, 2)
				}
				accepted := relay.Stats().Accepted
				queue <- numbered(2) // too late
				<-ended
				synctest.Wait()
				want(t, "accepted by the relay since SendAll has ended", relay.Stats().Accepted-accepted, 0)
			})
		})
	}
}

func TestSendAllYieldsEachMessageOnceAndReadsNoMoreThanItCanSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far, func(s *smtptest.Server) {
			s.Reject = map[string]string{"customer7@example.org": "550 5.1.1 no such user"}
		})
		client := newClient(t, configOf(relay))

		taken, yielded, most := 0, 0, 0
		var mu sync.Mutex // guards the three above
		messages := func(yield func(smtprelay.Message) bool) {
			for i := range 500 {
				mu.Lock()
				taken++
				most = max(most, taken-yielded)
				mu.Unlock()
				if !yield(numbered(i)) {
					return
				}
			}
		}
		var seen []string
		for r := range client.SendAll(t.Context(), messages) {
			if len(seen) == 0 {
				time.Sleep(time.Hour) // in the bubble's time: SendAll waits for a caller that is slow with the results
			}
			mu.Lock()
			yielded++
			mu.Unlock()
			to := r.Message.To[0]
			seen = append(seen, to)
			if refused := to == "customer7@example.org"; refused != (r.Err != nil) {
				t.Errorf("%s: %v", to, r.Err)
			}
		}
		slices.Sort(seen)
		want(t, "different messages among the results", len(slices.Compact(seen)), 500)
		want(t, "results", yielded, 500)
		want(t, "accepted by the relay", relay.Stats().Accepted, 499)
		atMost(t, "read and not yet yielded: six for each connection, and a few in between", most, 70)
	})
}

// Shutdown finishes what is in progress, sends QUIT, and leaves nothing behind.
func TestShutdownFinishesMessagesInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		client := newClient(t, configOf(relay))
		slow := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Minute, Count: 5})
		errs := make(chan error, 5)
		for i := range 5 {
			go func() { // ends when Send returns, which Shutdown waits for
				_, err := client.Send(t.Context(), numbered(i))
				errs <- err
			}()
		}
		if err := slow.Wait(t.Context(), 5); err != nil {
			t.Fatal(err)
		}
		if err := client.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		for range 5 {
			if err := <-errs; err != nil {
				t.Errorf("a Send in progress: %v", err)
			}
		}
		if _, err := client.Send(t.Context(), numbered(5)); !errors.Is(err, smtprelay.ErrClosed) {
			t.Errorf("a Send afterwards: %v, want ErrClosed", err)
		}
		want(t, "accepted by the relay", relay.Stats().Accepted, 5)
		want(t, "connections open", relay.Stats().Open, 0)
		for _, c := range relay.Conns() {
			want(t, fmt.Sprintf("QUITs on connection %d", c.Conn), c.Commands["QUIT"], 1)
		}
	})
}
