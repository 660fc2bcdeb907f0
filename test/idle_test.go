// Idle connections: how they end, and that this affects no caller.
package test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// openTen sends ten messages on ten connections, which are then idle.
func openTen(t *testing.T, relay *smtptest.Server, client *smtprelay.Client, first int) []sent {
	t.Helper()
	slow := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Second, Count: -1})
	defer slow.Remove()
	results := make([]sent, 10)
	var senders sync.WaitGroup
	for i := range results { // each begins while the connections before it are busy
		senders.Go(func() { results[i] = sendOne(t.Context(), client, first+i) })
		if err := slow.Wait(t.Context(), i+1); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
	}
	senders.Wait()
	synctest.Wait()
	want(t, "Stats().IdleConns", client.Stats().IdleConns, 10)
	return results
}

// usedBefore reports whether e is on one of the first ten connections, when it has carried an earlier message.
func usedBefore(e smtptest.Event) bool { return e.Conn <= 10 && e.Message > 1 }

// The relay has closed its idle connections, in one way or another, and the next messages notice it: no caller does.
func TestFirstMessagesAfterIdleTimeFindNoDeadConnection(t *testing.T) {
	for _, test := range []struct {
		name string
		smtptest.Fault
		longest time.Duration // that a message may take
	}{
		{"closed", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Drop: true}, 0},
		{"reset", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Abort: true}, 0},
		{"421", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Reply: "421 4.4.2 timeout", Drop: true}, 0},
		{"451 (Amazon SES, Gmail)", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Reply: "451 4.4.2 timeout", Drop: true}, 0},
		{"reset at the next command, as after a long sleep", smtptest.Fault{At: smtptest.Mail, Abort: true, When: usedBefore}, 0},
		{"421 to the next command", smtptest.Fault{At: smtptest.Mail, Reply: "421 4.4.2 timeout", Drop: true, When: usedBefore}, 0},
		{"forgotten by a firewall", smtptest.Fault{At: smtptest.Mail, Stall: true, When: usedBefore}, 5 * time.Minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near)
				cfg := configOf(relay)
				cfg.Limits.MaxIdleTime, cfg.Limits.MaxConnAge = -1, -1
				cfg.Retry.MaxAttempts = 1
				client := newClient(t, cfg)
				all := openTen(t, relay, client, 0)
				fault := test.Fault
				fault.Count = 10
				if fault.At == smtptest.Idle {
					relay.Fault(fault)
					time.Sleep(6 * time.Second)
					want(t, "Stats().IdleConns after 6 s", client.Stats().IdleConns, 0)
					want(t, "Stats().OpenConns after 6 s", client.Stats().OpenConns, 0)
				} else {
					time.Sleep(8 * time.Hour)
					relay.Fault(fault)
				}
				after := sendAtOnce(t.Context(), client, 1000, fewer(200))
				for _, s := range after {
					if s.err != nil && relay.Chunking && s.outcome() == smtprelay.Unknown && test.Fault.At == smtptest.Mail && test.Reply == "" {
						s.err = nil // the message was sent with its envelope, without any reply: its outcome is unknown
						continue
					}
					if s.err != nil {
						t.Errorf("message %d: %v", s.number, s.err)
					}
					if s.took > test.longest {
						t.Errorf("message %d took %v, want %v at most", s.number, s.took, test.longest)
					}
				}
				client.Close()
				relay.Close()
				checkLedger(t, relay, append(all, after...))
			})
		})
	}
}

// A firewall has forgotten ten idle connections: the message that finds the first one silent does not try the others.
func TestMessageWaitsForOneOfTheConnectionsThatAFirewallForgot(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		cfg := configOf(relay)
		cfg.Limits.MaxIdleTime = time.Hour
		client := newClient(t, cfg)
		openTen(t, relay, client, 0)
		time.Sleep(time.Minute)
		relay.Fault(smtptest.Fault{At: smtptest.Mail, Stall: true, When: usedBefore, Count: -1})
		if s := sendOne(t.Context(), client, 1000); s.err != nil || s.took > 35*time.Second {
			t.Errorf("%v after %v, want it accepted within 35 s", s.err, s.took)
		}
	})
}

// The end of an idle connection is not an error for anybody: only a Trace reports it.
func TestIdleConnectionsEndInSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var printed bytes.Buffer
		log.SetOutput(&printed)
		defer log.SetOutput(os.Stderr)
		defer slog.SetDefault(slog.Default())
		slog.SetDefault(slog.New(slog.NewTextHandler(&printed, nil)))

		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
		cfg := configOf(relay)
		var mu sync.Mutex    // guards the next
		var reasons []string // of the ends reported to the Trace
		cfg.Trace = &smtprelay.Trace{ConnClosed: func(_ context.Context, c smtprelay.ConnClosedInfo) {
			mu.Lock()
			defer mu.Unlock()
			reasons = append(reasons, c.Reason)
		}}
		client := newClient(t, cfg)
		sendNumbered(t, client, 1, 1)
		time.Sleep(time.Minute) // our own limit
		for _, f := range []smtptest.Fault{
			{Reply: "421 4.4.2 timeout", Drop: true}, {Reply: "451 4.4.2 timeout", Drop: true}, {Drop: true}, {Abort: true}, {Reply: "220 hello"},
		} {
			sendNumbered(t, client, 1, 1)
			f.At = smtptest.Idle
			relay.Fault(f)
			time.Sleep(time.Minute)
		}
		mu.Lock()
		defer mu.Unlock()
		if want := []string{"idle", "fault", "fault", "fault", "fault", "fault"}; !slices.Equal(reasons, want) {
			t.Errorf("connections ended for the reasons %q, want %q", reasons, want)
		}
		if printed.Len() > 0 {
			t.Errorf("printed: %s", printed.String())
		}
		want(t, "messages accepted", int(client.Stats().Accepted), 6)
		want(t, "messages not accepted", int(client.Stats().NotAccepted), 0)
	})
}

func TestIdleConnectionsAreAllUsedAgain(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		client := newClient(t, configOf(relay))
		for round := range 5 {
			noneFailed(t, openTen(t, relay, client, 10*round))
			want(t, "connections opened", len(relay.Conns()), 10)
			for _, c := range relay.Conns() {
				want(t, fmt.Sprintf("messages on connection %d", c.Conn), c.Accepted, round+1)
			}
		}
	})
}
