// What a caller is told: outcome, receipt and error, and that they match what the relay has.
package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Whatever the relay refuses, the connection continues and is counted.
func TestRefusedMessagesLeaveNoConnectionBehind(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) {
			s.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user", "bad@example.com": "550 5.7.1 not from you"}
		})
		relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Rcpt: "spam@example.org", Reply: "554 5.7.1 spam", Count: -1})
		client := newClient(t, configOf(relay))
		var senders sync.WaitGroup
		for i := range 50 {
			senders.Go(func() {
				for j, m := range []smtprelay.Message{
					{From: "shop@example.com", To: []string{"gone@example.org"}},
					{From: "bad@example.com", To: []string{"ann@example.org"}},
					{From: "shop@example.com", To: []string{"spam@example.org"}},
					{From: "shop@example.com", To: []string{"ann@example.org", "gone@example.org"}, AllOrNothing: true},
				} {
					m.Body = smtprelay.Bytes([]byte("Subject: refused\r\n\r\n"))
					if _, err := client.Send(t.Context(), m); smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || failure(err).Temporary() {
						t.Errorf("sender %d, message %d: %v; want it refused", i, j, err)
					}
				}
			})
		}
		senders.Wait()
		synctest.Wait()
		s := client.Stats()
		want(t, "Stats().OpenConns", s.OpenConns, s.IdleConns)
		want(t, "connections open at the relay", relay.Stats().Open, s.IdleConns)
		atMost(t, "open at once", relay.Stats().MaxOpen, 10)
		want(t, "messages at the relay", relay.Stats().Accepted, 0)
		time.Sleep(time.Minute)
		want(t, "connections open after a minute", relay.Stats().Open, 0)
	})
}

// Messages must not be confused by their timing: whatever goes wrong, the results match what the relay has.
func TestReceiptsAddUpToWhatTheRelayHas(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		client := newClient(t, configOf(relay))
		var n atomic.Int64
		every := func(k int64) func(smtptest.Event) bool {
			return func(smtptest.Event) bool { return n.Add(1)%k == 0 }
		}
		for _, f := range []smtptest.Fault{
			{At: smtptest.Mail, Drop: true, When: every(40)},
			{At: smtptest.Mail, Reply: "421 4.3.2 not now", Drop: true, When: every(40)},
			{At: smtptest.Rcpt, Reply: "550 5.1.1 nobody", When: every(20)},
			{At: smtptest.FinalDot, Reply: "451 4.3.0 later", When: every(30)},
			{At: smtptest.FinalDot, Abort: true, When: every(40)},
			{At: smtptest.Accepted, Drop: true, When: every(30)},
		} {
			f.Count = -1
			relay.Fault(f)
		}
		all := sendAtOnce(t.Context(), client, 0, 1000)
		client.Close()
		relay.Close()
		checkLedger(t, relay, all)
		var accepted, unknown, not int
		for _, s := range all {
			switch s.outcome() {
			case smtprelay.Accepted:
				accepted++
			case smtprelay.Unknown:
				unknown++
			default:
				not++
			}
		}
		if accepted > relay.Stats().Accepted || accepted+unknown < relay.Stats().Accepted || unknown == 0 || not == 0 {
			t.Errorf("%d accepted, %d unknown, %d not accepted; the relay has %d", accepted, unknown, not, relay.Stats().Accepted)
		}
		s := client.Stats()
		if int(s.Accepted) != accepted || int(s.Unknown) != unknown || int(s.NotAccepted) != not {
			t.Errorf("Stats %+v; want %d accepted, %d unknown, %d not accepted", s, accepted, unknown, not)
		}
	})
}

// errors.As finds the outcome in the error of every call that can fail.
func TestEveryErrorTellsItsOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
		var nobody noRelay
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		closed := newClient(t, configOf(relay))
		closed.Close()
		cfg := nobody.config()
		cfg.Retry.MaxAttempts = 1
		for name, err := range map[string]error{
			"no address":    func() error { _, err := smtprelay.New(smtprelay.Config{}); return err }(),
			"a bad address": sendErr(t.Context(), newClient(t, configOf(relay)), smtprelay.Message{From: "a@example.com", To: []string{"nobody"}, Body: smtprelay.Bytes([]byte("x"))}),
			"no relay":      sendErr(t.Context(), newClient(t, cfg), numbered(0)),
			"context":       sendErr(gone, newClient(t, configOf(relay)), numbered(0)),
			"closed":        sendErr(t.Context(), closed, numbered(0)),
			"SendMail":      newClient(t, cfg).SendMail("a@example.com", []string{"b@example.org"}, []byte("x")),
			"Ping":          newClient(t, cfg).Ping(t.Context()),
		} {
			wrapped := fmt.Errorf("order 7: %w", err)
			e, ok := errors.AsType[*smtprelay.Error](wrapped)
			if !ok || e.Outcome != smtprelay.NotAccepted || smtprelay.OutcomeOf(wrapped) != smtprelay.NotAccepted {
				t.Errorf("%s: %v; want an *Error, not accepted", name, err)
			}
		}
	})
}

// A caller that retries temporary refusals must not send to a recipient that may have the message.
func TestUnknownRecipientIsNotATemporaryRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
		relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
		client := newClient(t, configOf(relay))
		e := failure(sendErr(t.Context(), client, numbered(0)))
		if e.Outcome != smtprelay.Unknown || len(e.Recipients) != 1 || e.Recipients[0].Outcome != smtprelay.Unknown {
			t.Fatalf("%v, recipients %v; want one unknown", e, e.Recipients)
		}
		if to := smtprelay.RetryTo(e); len(to) != 0 {
			t.Errorf("RetryTo is %v", to)
		}
		want(t, "Stats().Refused", int(client.Stats().Refused), 0)
	})
}

func sendErr(ctx context.Context, client *smtprelay.Client, m smtprelay.Message) error {
	_, err := client.Send(ctx, m)
	return err
}

func TestErrorIsOneLineWhateverItQuotes(t *testing.T) {
	const forged = "x\x1b[2J\x00\u202e\u2028\u0085"
	for _, tt := range []struct{ why, offer, rcpt, to string }{
		{"a refusal of lines that look like ours", "250 relay", "550-x\n550-2026/11/30 02:00:00 smtprelay: accepted, queued as FORGED\n550 " + forged, "b@y.example"},
		{"a refusal with our advice", "250 relay", "550 no\"; check Username and Password", "b@y.example"},
		{"a bare CR", "250 relay", "550 no\rsmtprelay: accepted", "b@y.example"},
		{"a malformed reply", "250 relay", "what?" + forged, "b@y.example"},
		{"keywords", "250-relay\n250 AUTH" + forged, "550 no", "b@y.example"},
		{"mechanisms", "250-relay\n250 AUTH " + forged, "550 no", "b@y.example"},
		{"an address", "250 relay", "550 no", "b\r\nsmtprelay: \x1b[2J\u202e@y.example"},
		{"a long address", "250 relay", "550 no", strings.Repeat("b", 100_000) + "@y.example"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var logged bytes.Buffer
				cfg := smtprelay.Config{
					Addr: "relay.example:25", TLS: smtprelay.TLSNone, Retry: smtprelay.Retry{MaxAttempts: 1}, Limits: smtprelay.Limits{MaxConns: 1},
					Trace: smtprelay.LogTrace(slog.New(&plainHandler{out: &logged})),
					Dial: relaytest.Dial(0, func(_ int, line string) string {
						switch {
						case line == "":
							return "220 relay"
						case strings.HasPrefix(line, "EHLO"):
							return tt.offer
						case strings.HasPrefix(line, "RCPT"):
							return tt.rcpt
						}
						return "250 ok"
					}),
				}
				if strings.Contains(tt.offer, "AUTH") {
					cfg.Username, cfg.Password = "ann", "password-0123456789"
				}
				client := newClient(t, cfg)
				_, err := client.Send(t.Context(), smtprelay.Message{From: "a@x.example", To: []string{tt.to}, Body: smtprelay.Bytes([]byte("x"))})
				if err == nil {
					t.Fatal("no error")
				}
				client.Close()
				for _, text := range []string{err.Error(), strings.ReplaceAll(logged.String(), "\n\n", "")} {
					for _, r := range text {
						if !unicode.IsPrint(r) {
							t.Errorf("%U in %q", r, text)
							break
						}
					}
				}
				if len(err.Error()) > 5000 {
					t.Errorf("%d octets of error", len(err.Error()))
				}
				if strings.Contains(err.Error(), `no"; check`) {
					t.Errorf("the relay's text looks like ours: %s", err)
				}
			})
		})
	}
}

// plainHandler logs without escaping, like a program that trusts its input. Records end with two line ends.
type plainHandler struct {
	slog.Handler
	out *bytes.Buffer
	mu  sync.Mutex // guards what out points to
}

func (h *plainHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *plainHandler) Handle(_ context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.out.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(h.out, " %s=%v", a.Key, a.Value.Any())
		return true
	})
	h.out.WriteString("\n\n")
	return nil
}
