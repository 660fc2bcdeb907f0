// Examples of the program's commands, as a shell would run them.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/smtprelay/smtprelay/smtptest"
)

// smtprelay send --journal: the second run sends what the first one could not, and nothing twice.
func Example_send() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "bob@example.org", Reply: "452 4.2.2 mailbox full"}) // once
	os.Setenv("SMTP_URL", relay.URL())
	defer os.Unsetenv("SMTP_URL")
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"ann", "bob"} {
		text := "From: shop@example.com\nTo: " + name + "@example.org\nSubject: Your order\n\nIt is ready.\n"
		if err := os.WriteFile(filepath.Join(dir, name+".eml"), []byte(text), 0o600); err != nil {
			panic(err)
		}
	}
	for range 2 {
		args := []string{"smtprelay", "send", "--journal", filepath.Join(dir, "orders.journal"), dir}
		code := run(context.Background(), args, os.Stdin, os.Stdout, new(strings.Builder))
		fmt.Println("exit status", code)
	}
	// Output:
	// Messages: 1 accepted, 1 not sent yet.
	// Run the same command again: it goes on where it was.
	// exit status 3
	// Messages: 1 accepted, 1 accepted in earlier runs.
	// exit status 0
}

// smtprelay sendmail: as cron and others call it.
func Example_sendmail() {
	relay := smtptest.NewServer()
	defer relay.Close()
	os.Setenv("SMTP_URL", relay.URL())
	defer os.Unsetenv("SMTP_URL")

	mail := strings.NewReader("To: ann@example.org\nSubject: Cron\n\nAll is well.\n")
	code := run(context.Background(), []string{"/usr/sbin/sendmail", "-t", "-i", "-f", "cron@example.com"}, mail, os.Stdout, os.Stderr)
	fmt.Println(code, relay.Messages()[0].To)
	// Output:
	// 0 [ann@example.org]
}
