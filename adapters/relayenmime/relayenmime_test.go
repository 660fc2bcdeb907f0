// Here belongs what a relay gets of enmime's messages, and what the caller is told.
package relayenmime_test

import (
	"slices"
	"testing"

	"github.com/jhillyerd/enmime/v2"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/adapters/relayenmime"
	"github.com/smtprelay/smtprelay/internal/test/readback"
	"github.com/smtprelay/smtprelay/smtptest"
)

func builder() enmime.MailBuilder {
	return enmime.Builder().
		From("The Shop", "shop@example.com").
		To("Ann", "ann@example.org").
		CC("", "cyd@example.org").
		BCC("", "boss@example.com").
		Subject("Ihre Bestellung für März").
		Header("Message-ID", "<order-1@example.com>").
		Text([]byte("It is ready.")).
		HTML([]byte("<b>It is ready.</b>")).
		AddAttachment([]byte("%PDF-1.7"), "application/pdf", "invoice.pdf")
}

func TestMessageArrivesAsItWasBuilt(t *testing.T) {
	for name, send := range map[string]func(*smtprelay.Client) error{
		"Send":   func(c *smtprelay.Client) error { return relayenmime.Send(t.Context(), c, builder()) },
		"Sender": func(c *smtprelay.Client) error { return builder().Send(relayenmime.Sender{Client: c}) },
	} {
		t.Run(name, func(t *testing.T) {
			relay := smtptest.New(t)
			if err := send(relay.Client(t)); err != nil {
				t.Fatal(err)
			}
			got := readback.Message(t, readback.Only(t, relay), "shop@example.com", "ann@example.org", "cyd@example.org", "boss@example.com")
			if got.Header.Get("Bcc") != "" || got.Header.Get("From") != `"The Shop" <shop@example.com>` || got.Header.Get("To") != `"Ann" <ann@example.org>` {
				t.Errorf("header: %q", got.Header)
			}
			if got.Subject != "Ihre Bestellung für März" || got.Text != "It is ready." || got.HTML != "<b>It is ready.</b>" || string(got.Files["invoice.pdf"]) != "%PDF-1.7" {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestAddressesAreQuotedAndNamedOnce(t *testing.T) {
	m, err := relayenmime.MessageOf(builder().To("", "bob smith@example.org").BCC("", "ann@example.org"))
	if want := []string{"ann@example.org", `"bob smith"@example.org`, "cyd@example.org", "boss@example.com"}; err != nil || !slices.Equal(m.To, want) {
		t.Errorf("got %q, %v, want %q", m.To, err, want)
	}
}

func TestOneRefusedRecipientAndNobodyGetsIt(t *testing.T) {
	relay := smtptest.New(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "cyd@example.org", Reply: "452 4.2.2 mailbox full"})
	err := relayenmime.Send(t.Context(), relay.Client(t), builder())
	if smtprelay.OutcomeOf(err) != smtprelay.NotAccepted || len(smtprelay.RetryTo(err)) != 3 || relay.Stats().Accepted != 0 {
		t.Errorf("got %v, to be sent again to %q; the relay took %d", err, smtprelay.RetryTo(err), relay.Stats().Accepted)
	}
}

func TestMessageThatCannotBeBuiltIsNotRetried(t *testing.T) {
	err := relayenmime.Send(t.Context(), smtptest.New(t).Client(t), enmime.Builder().To("", "ann@example.org").Subject("no sender"))
	if err == nil || smtprelay.ShouldRetry(err) || smtprelay.OutcomeOf(err) != smtprelay.NotAccepted {
		t.Errorf("got %v", err)
	}
}
