// Quickstart shows what the library does, with one command and without an account: it sends 1,000 mails to a fake relay in its
// own process, and 100 of them in the usual way for comparison, and prints the results of both.
//
//	go run ./examples/quickstart
//
// With SMTP_URL set it sends one mail through that relay instead and prints the receipt.
//
//	SMTP_URL='smtps://apikey:KEY@smtp.sendgrid.net:465' go run ./examples/quickstart -from you@your.domain -to you@example.com
//
// The go:debug line is for net/smtp.SendMail, which cannot be given roots to trust; see sendTheUsualWay.
//
//go:debug x509usefallbackroots=1
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
)

func main() {
	from := flag.String("from", "", "with SMTP_URL: your address, which the relay must accept as sender")
	to := flag.String("to", "", "with SMTP_URL: the recipient")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: quickstart\n       SMTP_URL=smtps://user:password@host:465 quickstart -from you@your.domain -to you@example.com\nWithout SMTP_URL a fake relay accepts the mails.")
		flag.PrintDefaults()
	}
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if url := os.Getenv("SMTP_URL"); url != "" {
		err = sendOne(ctx, os.Stdout, url, *from, *to)
	} else {
		err = demo(ctx, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}
