package preset_test

import (
	"fmt"
	"os"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/preset"
)

func ExampleSendGrid() {
	cfg := preset.SendGrid(os.Getenv("SENDGRID_API_KEY"))
	cfg.Limits.MaxConns = 50 // of the 10,000 that SendGrid's page allows since 2020
	cfg.Limits.MaxMessagesPerConn = 1000
	client, err := smtprelay.New(cfg)
	if err != nil {
		fmt.Println("no client:", err)
		return
	}
	defer client.Close()
}

// In development the mail goes to a Mailpit on the same machine.
func ExampleMailpit() {
	cfg := preset.Mailpit()
	if key := os.Getenv("RESEND_API_KEY"); key != "" {
		cfg = preset.Resend(key)
	}
	fmt.Println(cfg.Addr)
	// Output: localhost:1025
}

func ExampleSES() {
	cfg := preset.SES("eu-west-1", "AKIA…", "secret")
	fmt.Println(cfg.Addr, cfg.Limits.MaxRecipients)
	// Output: email-smtp.eu-west-1.amazonaws.com:587 50
}
