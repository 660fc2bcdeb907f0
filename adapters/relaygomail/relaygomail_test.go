// Here belongs what a relay gets of gomail's messages, by which connections, and what the caller is told.
package relaygomail_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/smtp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gopkg.in/gomail.v2"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relaygomail"
	"github.com/smtprelay/smtprelay/internal/test/readback"
	"github.com/smtprelay/smtprelay/smtptest"
)

func message(to ...string) *gomail.Message {
	m := gomail.NewMessage()
	m.SetAddressHeader("From", "shop@example.com", "The Shop")
	m.SetHeader("To", to...)
	m.SetHeader("Subject", "Ihre Bestellung für März")
	m.SetBody("text/plain", "It is ready.")
	m.AddAlternative("text/html", "<b>It is ready.</b>")
	return m
}

func attach(m *gomail.Message) {
	m.Attach("invoice.pdf", gomail.SetCopyFunc(func(w io.Writer) error {
		_, err := io.WriteString(w, "%PDF-1.7")
		return err
	}))
}

// dialer is a Dialer for relay, made anew for each call as many programs do.
func dialer(relay *smtptest.Server) *gomail.Dialer {
	host, port, _ := net.SplitHostPort(relay.Addr())
	n, _ := strconv.Atoi(port)
	d := gomail.NewDialer(host, n, relay.Config().Username, relay.Config().Password)
	d.TLSConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // as many programs have it
	return d
}

func newRelay(t *testing.T, set ...func(*smtptest.Server)) *smtptest.Server {
	relay := smtptest.New(t, set...)
	t.Cleanup(func() {
		if err := relaygomail.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return relay
}

func TestMessageArrivesAsGomailHasBuiltIt(t *testing.T) {
	for name, send := range map[string]func(*smtptest.Server, *gomail.Message) error{
		"Send": func(r *smtptest.Server, m *gomail.Message) error {
			return relaygomail.Send(t.Context(), r.Client(t), m)
		},
		"DialAndSend": func(r *smtptest.Server, m *gomail.Message) error {
			return relaygomail.DialAndSend(t.Context(), dialer(r), m)
		},
	} {
		t.Run(name, func(t *testing.T) {
			relay := newRelay(t)
			m := message(`Ann <ann@example.org>`, `"bob smith"@example.org`)
			m.SetHeader("Cc", "ann@example.org", "cyd@example.org")
			m.SetHeader("Bcc", "boss@example.com")
			attach(m)
			if err := send(relay, m); err != nil {
				t.Fatal(err)
			}
			got := readback.Message(t, readback.Only(t, relay), "shop@example.com",
				"ann@example.org", `"bob smith"@example.org`, "cyd@example.org", "boss@example.com")
			if got.Header.Get("Bcc") != "" || got.Header.Get("From") != `"The Shop" <shop@example.com>` || !strings.Contains(got.Header.Get("To"), "ann@example.org") {
				t.Errorf("header: %q", got.Header)
			}
			if got.Subject != "Ihre Bestellung für März" || got.Text != "It is ready." || got.HTML != "<b>It is ready.</b>" || string(got.Files["invoice.pdf"]) != "%PDF-1.7" {
				t.Errorf("got %+v", got)
			}
		})
	}
}

// A reader can be read once, and a message that is tried again must still be whole.
func TestAnotherTryHasTheAttachmentToo(t *testing.T) {
	relay := newRelay(t)
	lost := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Reply: "421 4.3.2 closing", Drop: true})
	m := message("ann@example.org")
	file := strings.NewReader("%PDF-1.7")
	m.Attach("invoice.pdf", gomail.SetCopyFunc(func(w io.Writer) error {
		_, err := io.Copy(w, file)
		return err
	}))
	if err := relaygomail.Send(t.Context(), relay.Client(t), m); err != nil || lost.Hits() != 1 {
		t.Fatal(err, lost.Hits())
	}
	if got := readback.Message(t, readback.Only(t, relay), "shop@example.com", "ann@example.org"); string(got.Files["invoice.pdf"]) != "%PDF-1.7" {
		t.Errorf("got %q", got.Files)
	}
}

func TestMessageThatFailsToBeBuiltTroublesNoRelay(t *testing.T) {
	relay := newRelay(t)
	m := message("ann@example.org")
	m.Attach("gone.pdf") // is opened when the message is built
	err := relaygomail.Send(t.Context(), relay.Client(t), m)
	if smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || relay.Stats().Conns != 0 {
		t.Errorf("got %v, %d connections", err, relay.Stats().Conns)
	}
}

func TestSenderHeaderIsTheEnvelopesSender(t *testing.T) {
	m := message("ann@example.org")
	m.SetHeader("Sender", "bounces@example.com")
	got, err := relaygomail.MessageOf(m)
	if err != nil || got.From != "bounces@example.com" {
		t.Errorf("got %q, %v", got.From, err)
	}
}

func TestDialersMadeAnewShareTenConnections(t *testing.T) {
	relay := newRelay(t)
	var calls sync.WaitGroup
	for range 30 {
		calls.Go(func() {
			for range 10 {
				if err := relaygomail.DialAndSend(t.Context(), dialer(relay), message("ann@example.org")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	calls.Wait()
	if s := relay.Stats(); s.Accepted != 300 || s.Conns > 10 || s.Auths > 10 {
		t.Errorf("got %d messages by %d connections with %d AUTHs, want 300 by 10 at most", s.Accepted, s.Conns, s.Auths)
	}
}

func TestOtherSettingsAreAnotherPool(t *testing.T) {
	relay := newRelay(t, func(s *smtptest.Server) { s.NoTLS = true })
	good, wrong := dialer(relay), dialer(relay)
	wrong.Password = "wrong"
	if err := relaygomail.DialAndSend(t.Context(), good, message("ann@example.org")); err != nil {
		t.Fatal(err)
	}
	if err := relaygomail.DialAndSend(t.Context(), wrong, message("ann@example.org")); err == nil {
		t.Error("a message was sent with a wrong password, by the connection of another Dialer")
	}
}

func TestDialerThatCannotBeComparedHasItsOwnConnection(t *testing.T) {
	relay := newRelay(t)
	for _, set := range []func(*gomail.Dialer){
		func(d *gomail.Dialer) { d.TLSConfig = &tls.Config{RootCAs: relay.Roots()} },
		func(d *gomail.Dialer) { d.Auth = smtp.PlainAuth("", d.Username, d.Password, d.Host) },
	} {
		before := relay.Stats()
		d := dialer(relay)
		set(d)
		for range 2 {
			if err := relaygomail.DialAndSend(t.Context(), d, message("ann@example.org"), message("bob@example.org")); err != nil {
				t.Fatal(err)
			}
		}
		if after := relay.Stats(); after.Conns-before.Conns != 2 || after.Accepted-before.Accepted != 4 {
			t.Errorf("got %d messages by %d connections, want 4 by 2", after.Accepted-before.Accepted, after.Conns-before.Conns)
		}
	}
}

func TestOutcomeSurvives(t *testing.T) {
	for _, test := range []struct {
		fault   smtptest.Fault
		outcome smtprelay.Outcome
		again   []string
	}{
		{smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}, smtprelay.NotAccepted, nil},
		{smtptest.Fault{At: smtptest.FinalDot, Reply: "451 4.3.0 later"}, smtprelay.NotAccepted, []string{"ann@example.org"}},
		{smtptest.Fault{At: smtptest.Accepted, Drop: true}, smtprelay.Unknown, nil},
	} {
		relay := newRelay(t)
		client := relay.Client(t)
		if err := relaygomail.Send(t.Context(), client, message("first@example.org")); err != nil {
			t.Fatal(err)
		}
		relay.Fault(test.fault)
		err := relaygomail.Send(t.Context(), client, message("ann@example.org"), message("never@example.org"))
		if got := smtprelay.OutcomeOf(err); got != test.outcome {
			t.Errorf("%v: got %v, want %v", err, got, test.outcome)
		}
		if got := smtprelay.RetryTo(err); !slices.Equal(got, test.again) {
			t.Errorf("%v: to be sent again to %q, want %q", err, got, test.again)
		}
		var e *relaygomail.SendError
		if !errors.As(err, &e) || e.Index != 0 || !strings.HasPrefix(err.Error(), "gomail: could not send email 1: ") {
			t.Errorf("got %v, which does not tell which message", err)
		}
		if slices.ContainsFunc(relay.Messages(), func(m smtptest.Message) bool { return m.To[0] == "never@example.org" }) {
			t.Error("the message after the one that failed was sent")
		}
	}
}

func TestOneRefusedRecipientAndNobodyGetsIt(t *testing.T) {
	relay := newRelay(t, func(s *smtptest.Server) { s.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"} })
	if err := relaygomail.Send(t.Context(), relay.Client(t), message("ann@example.org", "gone@example.org")); err == nil || relay.Stats().Accepted != 0 {
		t.Errorf("got %v, and the relay took %d", err, relay.Stats().Accepted)
	}
}

func TestMessageWithoutEnvelopeIsNotRetried(t *testing.T) {
	nobody := gomail.NewMessage()
	nobody.SetHeader("To", "ann@example.org")
	bad := message("ann@@example.org")
	for _, m := range []*gomail.Message{nobody, bad, message()} {
		relay := newRelay(t)
		err := relaygomail.Send(t.Context(), relay.Client(t), m)
		if err == nil || smtprelay.ShouldRetry(err) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || relay.Stats().Conns != 0 {
			t.Errorf("got %v, %d connections", err, relay.Stats().Conns)
		}
	}
}

func TestRelayThatCannotBeReachedFailsAtOnce(t *testing.T) {
	relay := newRelay(t)
	d := dialer(relay)
	relay.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // what waits for the relay ends with ctx
	defer cancel()
	err := relaygomail.DialAndSend(ctx, d, message("ann@example.org"))
	if e, ok := errors.AsType[*smtprelay.Error](err); !ok || e.Op != smtprelay.OpDial || !smtprelay.ShouldRetry(err) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
