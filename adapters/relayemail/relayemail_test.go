// Here belongs what a relay gets of the messages of jordan-wright/email, and what the caller is told.
package relayemail_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/jordan-wright/email"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relayemail"
	"github.com/smtprelay/smtprelay/internal/test/readback"
	"github.com/smtprelay/smtprelay/smtptest"
)

func message(t *testing.T) *email.Email {
	t.Helper()
	e := email.NewEmail()
	e.From = "The Shop <shop@example.com>"
	e.To = []string{"Ann <ann@example.org>", `"bob smith"@example.org`}
	e.Cc = []string{"cyd@example.org", "ann@example.org"}
	e.Bcc = []string{"The Boss <boss@example.com>"}
	e.Subject = "Ihre Bestellung für März"
	e.Text = []byte("It is ready.")
	e.HTML = []byte("<b>It is ready.</b>")
	if _, err := e.Attach(strings.NewReader("%PDF-1.7"), "invoice.pdf", "application/pdf"); err != nil {
		t.Fatal(err)
	}
	return e
}

func TestMessageArrivesAsItWasBuilt(t *testing.T) {
	relay := smtptest.New(t)
	if err := relayemail.Send(t.Context(), relay.Client(t), message(t)); err != nil {
		t.Fatal(err)
	}
	got := readback.Message(t, readback.Only(t, relay), "shop@example.com", "ann@example.org", `"bob smith"@example.org`, "cyd@example.org", "boss@example.com")
	if got.Header.Get("Bcc") != "" || got.Header.Get("From") != `"The Shop" <shop@example.com>` || !strings.Contains(got.Header.Get("To"), "ann@example.org") {
		t.Errorf("header: %q", got.Header)
	}
	if got.Subject != "Ihre Bestellung für März" || got.Text != "It is ready." || got.HTML != "<b>It is ready.</b>" || string(got.Files["invoice.pdf"]) != "%PDF-1.7" {
		t.Errorf("got %+v", got)
	}
}

func TestSenderIsTheEnvelopesSender(t *testing.T) {
	e := message(t)
	e.Sender = "Bounces <bounces@example.com>"
	if m, err := relayemail.MessageOf(e); err != nil || m.From != "bounces@example.com" {
		t.Errorf("got %q, %v", m.From, err)
	}
}

func TestAnotherTryIsTheSameMessage(t *testing.T) {
	m, err := relayemail.MessageOf(message(t))
	if err != nil {
		t.Fatal(err)
	}
	var tries [2]strings.Builder
	for i := range tries {
		if _, err := m.Body.WriteTo(&tries[i]); err != nil {
			t.Fatal(err)
		}
	}
	if tries[0].String() != tries[1].String() {
		t.Error("the second try is another message")
	}
}

func TestOneRefusedRecipientAndNobodyGetsIt(t *testing.T) {
	relay := smtptest.New(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "cyd@example.org", Reply: "550 5.1.1 no such user"})
	err := relayemail.Send(t.Context(), relay.Client(t), message(t))
	if smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || slices.Contains(smtprelay.RetryTo(err), "cyd@example.org") || relay.Stats().Accepted != 0 {
		t.Errorf("got %v; the relay took %d", err, relay.Stats().Accepted)
	}
}

func TestMessageWithoutEnvelopeIsNotRetried(t *testing.T) {
	for name, spoil := range map[string]func(*email.Email){
		"no sender":     func(e *email.Email) { e.From = "" },
		"no recipient":  func(e *email.Email) { e.To, e.Cc, e.Bcc = nil, nil, nil },
		"a bad address": func(e *email.Email) { e.Bcc = []string{"boss@@example.com"} },
	} {
		e := message(t)
		spoil(e)
		relay := smtptest.New(t)
		err := relayemail.Send(t.Context(), relay.Client(t), e)
		if err == nil || smtprelay.ShouldRetry(err) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || relay.Stats().Conns != 0 {
			t.Errorf("%s: got %v", name, err)
		}
		if n := strings.Count(err.Error(), "smtprelay"); n != 1 {
			t.Errorf("%s: the error names smtprelay %d times: %v", name, n, err)
		}
	}
}
