// Message.BeforeEnd, as far as a dialogue script cannot test it.
package test

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func TestBeforeEndThatPanicsSendsNoEnd(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		client := newClient(t, configOf(relay))
		m := numbered(1)
		m.BeforeEnd = func(context.Context, []string) error { panic("no store") }
		func() {
			defer func() {
				if got := recover(); got != "no store" {
					t.Errorf("Send panicked with %v, want that of BeforeEnd", got)
				}
			}()
			client.Send(t.Context(), m)
		}()
		sendNumbered(t, client, 3, 1)
		want(t, "messages", len(relay.Messages()), 3)
	})
}

func TestBeforeEndGetsTheRecipientsOfEachTransaction(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		cfg := configOf(relay)
		cfg.Limits.MaxRecipients = 2
		client := newClient(t, cfg)
		m := smtprelay.Message{From: "a@x.example", Body: numbered(1).Body}
		for i := range 5 {
			m.To = append(m.To, fmt.Sprintf("b%d@y.example", i))
		}
		var told []string
		m.BeforeEnd = func(_ context.Context, to []string) error {
			atMost(t, "recipients of a transaction", len(to), 2)
			told = append(told, to...)
			clear(to) // the caller may change it
			return nil
		}
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(told, m.To) {
			t.Errorf("got %v, want %v", told, m.To)
		}
		want(t, "messages", len(relay.Messages()), 3)
	})
}
