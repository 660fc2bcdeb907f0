package smtprelay_test

import (
	"context"
	"fmt"
	"log"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// A mail to one recipient. A program makes one Client, at its start, and shares it.
func ExampleClient_Send() {
	relay := smtptest.NewServer() // in place of a real relay
	defer relay.Close()
	client, err := smtprelay.New(relay.Config()) // really: smtprelay.Config{Password: os.Getenv("SENDGRID_API_KEY")}
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	receipt, err := client.Send(context.Background(), smtprelay.Message{
		From: "shop@example.com",
		To:   []string{"ann@example.org"},
		Body: smtprelay.Bytes([]byte("From: shop@example.com\r\n" +
			"To: ann@example.org\r\n" +
			"Subject: Your order\r\n" +
			"\r\n" +
			"It is ready.\r\n")),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(receipt.Code, receipt.Recipients[0].To, receipt.Recipients[0].Outcome)
	fmt.Println("the relay names it:", receipt.QueueID == relay.Messages()[0].ID)
	// Output:
	// 250 ann@example.org accepted
	// the relay names it: true
}
