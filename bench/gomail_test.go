package main

// Tests that a message of go-mail is sent with its own envelope, and an example.

import (
	"context"
	"errors"
	"fmt"
	"log"
	"strings"
	"testing"

	"github.com/wneessen/go-mail"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func TestMessageOfGoMailIsSentToAllItsRecipients(t *testing.T) {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	msg := mail.NewMsg()
	for _, err := range []error{
		msg.FromFormat("The Shop", "shop@example.com"),
		msg.EnvelopeFrom("bounces@example.com"),
		msg.To("Ann <ann@example.org>", `"bob b"@example.org`),
		msg.Cc("ann@example.org"),
		msg.Bcc("Eve <eve@example.org>"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	msg.Subject("hi")
	msg.SetBodyString(mail.TypeTextPlain, "hi")
	m, err := smtprelay.MessageOf(msg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	got := relay.Messages()
	if len(got) != 1 || got[0].From != "bounces@example.com" || fmt.Sprint(got[0].To) != `[ann@example.org "bob b"@example.org eve@example.org]` {
		t.Fatalf("the relay got %+v", got)
	}
	if body := string(got[0].Body); !strings.Contains(body, "Subject: hi") || strings.Contains(body, "eve@example.org") {
		t.Errorf("the relay got the body %q", body)
	}
}

// HTML with a text alternative and an attachment: go-mail builds the mail, and smtprelay sends it with its envelope.
func Example_htmlWithAttachment() {
	relay := smtptest.NewServer()
	defer relay.Close()
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	msg := mail.NewMsg()
	if err := errors.Join(msg.FromFormat("The Shop", "shop@example.com"), msg.To("ann@example.org"), msg.Bcc("archive@example.com")); err != nil {
		log.Fatal(err)
	}
	msg.Subject("Your invoice")
	msg.SetMessageID()
	msg.SetDate()
	msg.SetBodyString(mail.TypeTextPlain, "The invoice is attached.")
	msg.AddAlternativeString(mail.TypeTextHTML, "<p>The invoice is <b>attached</b>.</p>")
	if err := msg.AttachReader("invoice.pdf", strings.NewReader("%PDF-1.7 …")); err != nil {
		log.Fatal(err)
	}
	m, err := smtprelay.MessageOf(msg)
	if err != nil {
		log.Fatal(err)
	}
	_, err = client.Send(context.Background(), m)
	body := string(relay.Messages()[0].Body)
	fmt.Println(err, m.To, strings.Contains(body, "text/html"), strings.Contains(body, `filename="invoice.pdf"`))
	// Output:
	// <nil> [ann@example.org archive@example.com] true true
}
