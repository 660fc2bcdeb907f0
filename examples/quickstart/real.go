package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
)

// sendOne sends one mail through the relay that url names and prints the receipt.
func sendOne(ctx context.Context, out io.Writer, url, from, to string) error {
	if from == "" || to == "" {
		return errors.New("set -from and -to: an address that the relay accepts as sender, and a recipient")
	}
	cfg, err := smtprelay.ParseURL(url)
	if err != nil {
		return fmt.Errorf("SMTP_URL: %s", oneLine(err.Error()))
	}
	// A user is waiting: report a mistake after the first try, and soon. A service keeps the defaults.
	cfg.Retry.MaxAttempts = 1
	cfg.Timeouts.Dial = 10 * time.Second
	cfg.Timeouts.Greeting = 15 * time.Second
	client, err := smtprelay.New(cfg)
	if err != nil {
		return err
	}
	defer client.Close()

	m, err := compose(from, to, "A mail from smtprelay's quickstart", nil)
	if err != nil {
		return err
	}
	start := time.Now()
	receipt, err := client.Send(ctx, smtprelay.Message{From: m.from, To: []string{m.to}, Body: smtprelay.Bytes(m.data)})
	if err != nil {
		return advise(err)
	}
	fmt.Fprintf(out, "Accepted in %v.\n", time.Since(start).Round(time.Millisecond))
	fmt.Fprintf(out, "  relay      %s\n", cfg.Addr)
	fmt.Fprintf(out, "  reply      %d %s\n", receipt.Reply.Code, oneLine(receipt.Reply.Message))
	if receipt.QueueID != "" {
		fmt.Fprintf(out, "  queue ID   %s\n", receipt.QueueID)
	}
	for _, r := range receipt.Recipients {
		fmt.Fprintf(out, "  recipient  %s: %v, %d %s\n", r.To, r.Outcome, r.Reply.Code, oneLine(r.Reply.Message))
	}
	return client.Shutdown(ctx)
}

// advise adds to an error which of this program's settings to change.
func advise(err error) error {
	var e *smtprelay.Error
	if !errors.As(err, &e) {
		return err
	}
	var advice string
	switch {
	case e.Op == smtprelay.OpDial:
		advice = "; they are in SMTP_URL (ports: 587, 465 or 2525; many networks block 25)"
	case e.Op == smtprelay.OpGreeting, e.Op == smtprelay.OpSTARTTLS, e.Op == smtprelay.OpTLS:
		advice = "; in SMTP_URL, smtps:// is for a port with TLS from the first byte (465), smtp:// for one with STARTTLS (587, 2525, 25)"
	case e.Op == smtprelay.OpAuth && !e.Temporary():
		advice = "; both are in SMTP_URL"
	case e.Op == smtprelay.OpMail && !e.Temporary():
		advice = "; -from must be an address that the relay accepts as sender"
	}
	return errors.New(oneLine(err.Error()) + advice)
}

// oneLine joins the lines of a reply, or of several mistakes.
func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }
