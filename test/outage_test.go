// Relays that are away, restart, fall silent or refuse everything: how often they are dialled, how long a Send waits for them,
// and that it waits for nothing else.
package test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// everySecond has each sender send a message, and again a second after the last one ended, for a while.
func everySecond(t *testing.T, client *smtprelay.Client, senders int, for_ time.Duration) (all []sent) {
	ends := time.Now().Add(for_)
	var mu sync.Mutex // guards all
	var running sync.WaitGroup
	for i := range senders {
		running.Go(func() {
			for n := i; time.Now().Before(ends); n += senders {
				s := sendOne(t.Context(), client, n)
				mu.Lock()
				all = append(all, s)
				mu.Unlock()
				time.Sleep(time.Second)
			}
		})
	}
	running.Wait()
	return all
}

// refused is a Dial that fails for a while, and then connects to the relay.
func refused(relay *smtptest.Server, away time.Duration) (*noRelay, func(ctx context.Context, network, addr string) (net.Conn, error)) {
	nobody, back := &noRelay{}, time.Now().Add(away)
	return nobody, func(ctx context.Context, network, addr string) (net.Conn, error) {
		if time.Now().Before(back) {
			return nobody.Dial(ctx, network, addr)
		}
		return relay.Dial(ctx, network, addr)
	}
}

// A relay that does not work is not dialled often, wherever it fails and whatever it replies: a hundred senders together dial
// about as often as one.
func TestFailingRelayIsDialledRarelyWhereverItFails(t *testing.T) {
	rows := map[string]smtptest.Fault{
		"greeting 421":                  {At: smtptest.Connect, Reply: "421 4.3.2 draining", Drop: true},
		"greeting 554":                  {At: smtptest.Connect, Reply: "554 5.7.1 no", Drop: true},
		"greeting 450":                  {At: smtptest.Connect, Reply: "450 4.7.1 later", Drop: true},
		"hangs up at the greeting":      {At: smtptest.Connect, Drop: true},
		"hangs up at EHLO":              {At: smtptest.EHLO, Drop: true},
		"EHLO 451":                      {At: smtptest.EHLO, Reply: "451 4.3.0 later"},
		"hangs up at AUTH":              {At: smtptest.Auth, Drop: true},
		"AUTH 421":                      {At: smtptest.Auth, Reply: "421 4.7.0 later", Drop: true},
		"AUTH 454":                      {At: smtptest.Auth, Reply: "454 4.7.0 later"},
		"AUTH 454, too many logins":     {At: smtptest.Auth, Reply: "454 4.7.0 Too many login attempts"},
		"hangs up at MAIL":              {At: smtptest.Mail, Drop: true},
		"MAIL 421":                      {At: smtptest.Mail, Reply: "421 4.3.2 bye", Drop: true},
		"MAIL 421, stays open":          {At: smtptest.Mail, Reply: "421 4.3.2 bye"},
		"MAIL 503":                      {At: smtptest.Mail, Reply: "503 5.5.1 bad sequence"},
		"MAIL 530":                      {At: smtptest.Mail, Reply: "530 5.7.0 log in"},
		"MAIL 432":                      {At: smtptest.Mail, Reply: "432 4.3.2 Concurrent connections limit exceeded"},
		"MAIL 250 twice":                {At: smtptest.Mail, Reply: "250 ok\n250 ok"},
		"MAIL, no SMTP":                 {At: smtptest.Mail, Reply: "what?"},
		"hangs up at RCPT":              {At: smtptest.Rcpt, Drop: true},
		"RCPT 421":                      {At: smtptest.Rcpt, Reply: "421 4.3.2 bye", Drop: true},
		"hangs up at DATA":              {At: smtptest.Data, Drop: true},
		"DATA 421":                      {At: smtptest.Data, Reply: "421 4.3.2 bye", Drop: true},
		"resets in the body":            {At: smtptest.Body, Abort: true},
		"421 at the dot":                {At: smtptest.FinalDot, Reply: "421 4.3.2 bye", Drop: true},
		"432 at the dot":                {At: smtptest.FinalDot, Reply: "432 4.3.2 Concurrent connections limit exceeded"},
		"MAIL 451, too many messages":   {At: smtptest.Mail, Reply: "451 4.5.3 Too many messages in this session", Drop: true},
		"MAIL 454, slow down, hangs up": {At: smtptest.Mail, Reply: "454 Throttling failure: Maximum sending rate exceeded.", Drop: true},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
				row.Count = -1
				relay.Fault(row)
				all := everySecond(t, newClient(t, configOf(relay)), 100, 10*time.Minute)
				atMost(t, "connections in ten minutes", len(relay.Conns()), 100)
				if len(relay.Conns()) < 3 {
					t.Errorf("%d connections in ten minutes: a relay that works again is not found", len(relay.Conns()))
				}
				for _, s := range all {
					if s.outcome() == smtprelay.Accepted || s.took > 2*time.Minute+30*time.Second {
						t.Fatalf("%v after %v", s.err, s.took)
					}
				}
				want(t, "messages at the relay", relay.Stats().Accepted, 0)
			})
		})
	}
	t.Run("TCP refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var nobody noRelay
			everySecond(t, newClient(t, nobody.config()), 100, 10*time.Minute)
			atMost(t, "dials in ten minutes", len(nobody.dials()), 100)
		})
	})
}

// A relay restarts under load: Sends with enough time wait for it, and no message fails.
func TestRestartFailsNoMessageWithEnoughTime(t *testing.T) {
	messages := fewer(10_000)
	for _, away := range []time.Duration{5 * time.Second, 20 * time.Second} {
		for _, greets := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, greets: %t", away, greets), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS, s.DropBodies = true, true, true })
					cfg := configOf(relay)
					if greets {
						back := time.Now().Add(away)
						relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 restarting", Drop: true, Count: -1,
							When: func(smtptest.Event) bool { return time.Now().Before(back) }})
					} else {
						_, cfg.Dial = refused(relay, away)
					}
					ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
					defer cancel()
					all := sendAtOnce(ctx, newClient(t, cfg), 0, messages)
					allAccepted(t, relay, all)
					most := time.Duration(0)
					for _, s := range all {
						most = max(most, s.took)
					}
					if most > away+31*time.Second { // a back-off
						t.Errorf("the last of them took %v", most)
					}
					atMost(t, "open at once", relay.Stats().MaxOpen, 10)
				})
			})
		}
	}
}

// A relay restarts in the middle of traffic: connections are reset, and dials refused for a while.
func TestRestartInTheMiddleOfTrafficFailsNoMessage(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		cfg := configOf(relay)
		var mu sync.Mutex // guards until
		var until time.Time
		var nobody noRelay
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			if time.Now().Before(until) {
				return nobody.Dial(ctx, network, addr)
			}
			return relay.Dial(ctx, network, addr)
		}
		client := newClient(t, cfg)
		go func() { // ends within the traffic
			for range 3 {
				time.Sleep(15500 * time.Millisecond)
				mu.Lock()
				until = time.Now().Add(5 * time.Second)
				mu.Unlock()
				relay.CloseClientConnections()
			}
		}()
		all := everySecond(t, client, 50, time.Minute)
		allAccepted(t, relay, all)
	})
}

// An idle connection is cut and loses everything written to it: the message is delivered on another connection, and is never
// unknown.
func TestIdleConnectionThatSwallowsEverythingCostsHalfAMinute(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		cfg := configOf(relay)
		cfg.Limits.MaxIdleTime = -1
		cfg.Limits.MaxConnAge = -1
		for _, conns := range []int{1, 3} {
			client := newClient(t, cfg)
			noneFailed(t, sendAtOnce(t.Context(), client, 100*conns, conns))
			time.Sleep(2 * time.Minute)
			first := len(relay.Conns())
			relay.Fault(smtptest.Fault{Stall: true, Count: -1, When: func(e smtptest.Event) bool { return e.Conn <= first }})
			all := sendAtOnce(t.Context(), client, 100*conns+10, 3)
			noneFailed(t, all)
			for _, s := range all {
				if s.took > 35*time.Second {
					t.Errorf("message %d took %v", s.number, s.took)
				}
			}
		}
	})
}

// A relay that is silent for ten seconds is not an outage of minutes: all messages are delivered soon after, including those that
// arrive while the old connections still hang. forgets: the relay never answers commands of that time.
func TestMomentOfSilenceIsNoOutage(t *testing.T) {
	for _, row := range []struct {
		step    smtptest.Step
		forgets bool
	}{
		{smtptest.Connect, true}, {smtptest.EHLO, true}, {smtptest.Auth, true},
		{smtptest.Connect, false}, {smtptest.Auth, false}, {smtptest.Mail, false}, {smtptest.FinalDot, false}, {0, false},
	} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near)
			back := time.Now().Add(10 * time.Second)
			silent := relay.Fault(smtptest.Fault{At: row.step, Stall: true, Count: -1, When: func(smtptest.Event) bool { return time.Now().Before(back) }})
			client := newClient(t, configOf(relay))
			var all []sent
			var waiting sync.WaitGroup
			waiting.Go(func() { all = sendAtOnce(t.Context(), client, 0, 100) })
			time.Sleep(10 * time.Second)
			if !row.forgets {
				silent.Remove()
			}
			time.Sleep(10 * time.Second)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			late := sendOne(ctx, client, 100)
			waiting.Wait()
			all = append(all, late)
			for _, s := range all {
				if s.err != nil || s.began.Add(s.took).Sub(back) > 40*time.Second {
					t.Fatalf("%+v, message %d: %v after %v", row, s.number, s.err, s.took)
				}
			}
			checkLedger(t, relay, all)
		})
	}
}

// One connection falls silent, and the context of its Send ends. The next Send does not wait for it: other slots are free.
func TestSilentConnectionDoesNotDelayTheNextSend(t *testing.T) {
	for _, step := range []smtptest.Step{smtptest.Connect, smtptest.EHLO, smtptest.Auth, smtptest.Mail, smtptest.FinalDot} {
		for _, conns := range []int{1, 2, 10} {
			for _, proven := range []bool{false, true} {
				inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
					relay := newRelay(t, near)
					cfg := configOf(relay)
					cfg.Limits.MaxConns = conns
					client := newClient(t, cfg)
					if proven {
						noneFailed(t, sendAtOnce(t.Context(), client, 0, 1))
						time.Sleep(time.Minute) // so that this connection is gone
					}
					relay.Fault(smtptest.Fault{At: step, Stall: true})
					ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
					defer cancel()
					sendOne(ctx, client, 1)
					patience := 15 * time.Second
					if conns == 1 {
						patience = 31 * time.Second // there is no other slot
					}
					s := sendOne(t.Context(), client, 2)
					if s.err != nil || s.took > patience {
						t.Errorf("silent at %v, MaxConns %d, proven %t: %v after %v", step, conns, proven, s.err, s.took)
					}
				})
			}
		}
	}
}

// swallowing is a Dial whose connections discard everything and never answer.
func swallowing(context.Context, string, string) (net.Conn, error) {
	near, far := netpipe.New(1 << 20)
	go func() { // ends with the connection
		buf := make([]byte, 4096)
		for {
			if _, err := far.Read(buf); err != nil {
				far.Close()
				return
			}
		}
	}()
	return near, nil
}

// The longest that a caller without a deadline waits, with the defaults.
func TestSendWithoutADeadlineEndsInTime(t *testing.T) {
	agree := func(reply func(line string) (string, bool)) func(context.Context, string, string) (net.Conn, error) {
		return relaytest.Dial(0, func(_ int, line string) string {
			if said, ok := reply(line); ok {
				return said
			}
			return relaytest.Agree("250-PIPELINING\n250 AUTH PLAIN", line)
		})
	}
	beginsWith := func(verb, reply string) func(string) (string, bool) {
		return func(line string) (string, bool) { return reply, strings.HasPrefix(line, verb) }
	}
	off := func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	hanging := func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	for _, row := range []struct {
		relay string
		dial  func(context.Context, string, string) (net.Conn, error)
		most  time.Duration
		says  string
	}{
		{"off: TCP is refused", off, 2 * time.Minute, "connection refused"},
		{"off: nothing comes back", hanging, 2*time.Minute + 10*time.Second, "deadline"},
		{"silent: no greeting", swallowing, 2*time.Minute + 10*time.Second, "greeting"},
		{"silent at AUTH", agree(beginsWith("AUTH", "")), 2*time.Minute + 10*time.Second, "AUTH"},
		{"refuses everybody: 554 greeting", agree(func(l string) (string, bool) { return "554 no", l == "" }), time.Second, "554"},
		{"refuses everybody: 421 greeting", agree(func(l string) (string, bool) { return "421 busy" + relaytest.Hangup, l == "" }), 2 * time.Minute, "421"},
		{"refuses the password", agree(beginsWith("AUTH", "535 5.7.8 no")), time.Second, "535"},
		{"refuses each sender", agree(func(l string) (string, bool) {
			return "550 5.7.1 no", strings.HasPrefix(l, "MAIL") || strings.HasPrefix(l, "RCPT") || l == "DATA"
		}), time.Second, "550"},
		{"hangs up at MAIL", agree(beginsWith("MAIL", relaytest.Hangup)), 2*time.Minute + 10*time.Second, ""},
		{"silent at MAIL", agree(func(l string) (string, bool) {
			if strings.HasPrefix(l, "MAIL") {
				time.Sleep(time.Hour) // the relay reads nothing meanwhile
			}
			return "", false
		}), 2*time.Minute + 10*time.Second, ""},
	} {
		for _, senders := range []int{1, 30} {
			synctest.Test(t, func(t *testing.T) {
				client := newClient(t, smtprelay.Config{
					Addr: "relay.example:25", TLS: smtprelay.TLSNone, AllowInsecureAuth: true, Username: "me", Password: "secret", Dial: row.dial,
				})
				most := time.Duration(0)
				for _, s := range sendAtOnce(t.Context(), client, 0, senders) {
					most = max(most, s.took)
					if s.outcome() != smtprelay.NotAccepted || !contains(s.err, row.says) {
						t.Errorf("%s, %d senders: %v", row.relay, senders, s.err)
					}
				}
				t.Logf("%s, %d senders: at most %v", row.relay, senders, most)
				if most > row.most {
					t.Errorf("%s, %d senders: %v, want at most %v", row.relay, senders, most, row.most)
				}
				client.Close()
				time.Sleep(2 * time.Hour) // for the relay to end
			})
		}
	}
}

// Connections that work do not open the gate for others that cannot be opened.
func TestRelayWithTwoConnectionsIsNotDialledForEachMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) {
			s.InMemory, s.NoTLS, s.NoAuth, s.MaxMessages, s.Delay = true, true, true, -1, 20*time.Millisecond
		})
		relay.Fault(smtptest.Fault{At: smtptest.Connect, When: moreThan(2, relay), Drop: true, Count: -1})
		cfg := configOf(relay)
		cfg.Limits.MaxMessagesPerConn, cfg.Limits.MaxConnAge = -1, -1
		client := newClient(t, cfg)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var senders sync.WaitGroup
		for i := range 5 {
			senders.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					if s := sendOne(t.Context(), client, 100_000*i+n); s.err != nil {
						t.Error(s.err)
						return
					}
				}
			})
		}
		senders.Wait()
		if n := relay.Stats().Accepted; n < 300 {
			t.Errorf("%d messages: this test shows nothing", n)
		}
		atMost(t, "connections in a minute, one after each wait of 15 s on average", len(relay.Conns()), 30)
	})
}

// After a failure one connection must show that the relay works before others are opened. If its caller abandons it, others do
// not wait for it.
func TestCallerThatGivesUpAfterAFailureDelaysNoOther(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		relay.Fault(smtptest.Fault{At: smtptest.Connect, Drop: true})
		silent := relay.Fault(smtptest.Fault{At: smtptest.Mail, Stall: true})
		client := newClient(t, configOf(relay))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		var first sent
		var callers sync.WaitGroup
		callers.Go(func() { first = sendOne(ctx, client, 0) })
		if err := silent.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		second := sendOne(t.Context(), client, 1)
		callers.Wait()
		if first.outcome() != smtprelay.NotAccepted || second.err != nil {
			t.Errorf("the first: %v, the second: %v; want the first given up and the second accepted", first.err, second.err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("the second took %v; want it sent when the first is given up, 2 s after it began", took)
		}
	})
}

// The reply to a command of one message may name addresses: others get only its code.
func TestReplyTextOfAnotherMessageIsNotReported(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		for _, reply := range []string{"354 somebody@example.com is odd", "503 5.5.1 somebody@example.com is odd"} {
			relay := newRelay(t, near)
			relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: reply, Count: -1})
			cfg := configOf(relay)
			cfg.Retry.MaxAttempts = 1
			client := newClient(t, cfg)
			sendOne(t.Context(), client, 0)
			synctest.Wait() // for the end of the connection
			m := numbered(1)
			m.FailFast = true
			_, err := client.Send(t.Context(), m)
			if e := failure(err); e.Op != smtprelay.OpWait || strings.Contains(e.Error(), "odd") || !strings.Contains(e.Error(), reply[:3]) {
				t.Errorf("after %q to another message: %v; want the code and not the words", reply, err)
			}
		}
	})
}
