// Here belongs what a relay gets of mailyak's messages, and what the caller is told.
package relaymailyak_test

import (
	"strings"
	"testing"

	"github.com/domodwyer/mailyak/v3"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relaymailyak"
	"github.com/smtprelay/smtprelay/internal/test/readback"
	"github.com/smtprelay/smtprelay/smtptest"
)

func message() *mailyak.MailYak {
	m := mailyak.New("", nil)
	m.From("shop@example.com")
	m.FromName("Smith, John")
	m.To("Ann <ann@example.org>", `"bob smith"@example.org`)
	m.Cc("cyd@example.org", "ann@example.org")
	m.Bcc("The Boss <boss@example.com>", "dan@example.com")
	m.Subject("Ihre Bestellung für März")
	m.AddHeader("Message-ID", "<order-1@example.com>")
	m.Plain().Set("It is ready.")
	m.HTML().Set("<b>It is ready.</b>")
	m.Attach("invoice.pdf", strings.NewReader("%PDF-1.7"))
	return m
}

func TestMessageArrivesAsItWasBuilt(t *testing.T) {
	relay := smtptest.New(t)
	m := message()
	m.WriteBccHeader(true) // as somebody may have needed for another service
	if err := relaymailyak.Send(t.Context(), relay.Client(t), m); err != nil {
		t.Fatal(err)
	}
	arrived := readback.Only(t, relay)
	if strings.Contains(strings.ToLower(string(arrived.Body)), "bcc") || strings.Contains(string(arrived.Body), "boss") {
		t.Errorf("the blind copies can be seen:\n%s", arrived.Body)
	}
	if !strings.HasPrefix(string(arrived.Body), "From: Smith, John <shop@example.com>\r\n") {
		t.Errorf("From has changed:\n%s", arrived.Body)
	}
	// Every reader understands mailyak's From with a comma in another way; the rest is read.
	arrived.Body = []byte(strings.Replace(string(arrived.Body), "Smith, John", "John", 1))
	got := readback.Message(t, arrived, "shop@example.com", "ann@example.org", `"bob smith"@example.org`, "cyd@example.org", "boss@example.com", "dan@example.com")
	if !strings.Contains(got.Header.Get("To"), "ann@example.org") || got.Header.Get("Message-Id") != "<order-1@example.com>" {
		t.Errorf("header: %q", got.Header)
	}
	if got.Subject != "Ihre Bestellung für März" || got.Text != "It is ready." || got.HTML != "<b>It is ready.</b>" || string(got.Files["invoice.pdf"]) != "%PDF-1.7" {
		t.Errorf("got %+v", got)
	}
}

func TestBlindCopiesAloneAreEnough(t *testing.T) {
	m := mailyak.New("", nil)
	m.From("shop@example.com")
	m.Bcc("boss@example.com")
	m.Plain().Set("Bcc: nobody@example.com is text here.")
	relay := smtptest.New(t)
	if err := relaymailyak.Send(t.Context(), relay.Client(t), m); err != nil {
		t.Fatal(err)
	}
	if got := readback.Message(t, readback.Only(t, relay), "shop@example.com", "boss@example.com"); got.Text != "Bcc: nobody@example.com is text here." {
		t.Errorf("got %+v", got)
	}
}

func TestOneRefusedRecipientAndNobodyGetsIt(t *testing.T) {
	relay := smtptest.New(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "cyd@example.org", Reply: "452 4.2.2 mailbox full"})
	err := relaymailyak.Send(t.Context(), relay.Client(t), message())
	if smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || len(smtprelay.RetryTo(err)) == 0 || relay.Stats().Accepted != 0 {
		t.Errorf("got %v, to be sent again to %q; the relay took %d", err, smtprelay.RetryTo(err), relay.Stats().Accepted)
	}
}

func TestMessageWithoutEnvelopeIsNotRetried(t *testing.T) {
	for name, spoil := range map[string]func(*mailyak.MailYak){
		"no sender":           func(m *mailyak.MailYak) { m.From("") },
		"no recipient":        func(m *mailyak.MailYak) { m.To(); m.Cc(); m.Bcc() },
		"a bad address":       func(m *mailyak.MailYak) { m.Bcc("boss@@example.com") },
		"a return in a field": func(m *mailyak.MailYak) { m.ReplyTo("a@example.com\rBcc: eve@example.com") },
	} {
		m := message()
		spoil(m)
		relay := smtptest.New(t)
		err := relaymailyak.Send(t.Context(), relay.Client(t), m)
		if err == nil || smtprelay.ShouldRetry(err) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || relay.Stats().Conns != 0 {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
