// Package callsites shows smtprelay where services call it: in a web handler, a batch that stores results in database rows, a
// worker of a job queue, a service with a relay for each tenant, and a test of a failure. Each is as short as possible without
// losing a message or sending one twice.
package callsites

// message returns a mail in the form of RFC 5322.
func message(to string) []byte {
	return []byte("From: shop@example.com\r\nTo: " + to + "\r\nSubject: Your order\r\n\r\nIt is ready.\r\n")
}
